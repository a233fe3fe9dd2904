"""A run that starts from pretrained weights, and the export of its model."""

import json
import logging
import shutil

import numpy as np
import pytest
from pytorch import pytorch
from run_files import losses, saved_state
from safetensors.numpy import load_file
from saved_clip import flat, save_clip
from tiny_run import TOWER, evaluation_of

from vlab_jax import config as configuration
from vlab_jax.data import tokenizer as tokenizers
from vlab_jax.errors import InputError
from vlab_jax.evaluation.checkpoint import evaluate
from vlab_jax.export import export, main
from vlab_jax.runtime import sharding
from vlab_jax.training.inputs import open_pretrained, pretrained_parameters, random_parameters
from vlab_jax.training.loop import train
from vlab_jax.training.setup import make_model


@pytest.fixture
def from_clip(config, clip):
    """The tiny run's config, starting from that CLIP, with a stage that only a run from scratch needs."""
    config.model.pretrained = str(clip[0])
    config.tokenizer.kind = "bpe"  # the saved CLIP has no tokenizer
    config.stage.clip = configuration.stage_config(steps=1, batch_size=8, only_from_scratch=True)
    config.stages = ("clip", *config.stages)
    return config


def test_clip_is_taken_the_decoder_is_copied_and_the_rest_is_new(from_clip, clip, caplog):
    from_clip = configuration.resolved(from_clip)
    from_clip.model.image_encoder = "separate"
    mesh = sharding.make_mesh()
    model = make_model(from_clip, mesh)
    with caplog.at_level(logging.INFO):
        pretrained = open_pretrained(from_clip.model.pretrained, from_clip.model.to_dict())
        parameters = pretrained_parameters(pretrained, model, 0, mesh)
    made, fresh = flat(parameters), flat(random_parameters(model, 0, mesh))
    assert made.keys() == fresh.keys()
    for path, array in made.items():
        part, _, rest = path.partition("/")
        source = {"image_encoder": f"vision/{rest}", "decoder": f"text/{rest}"}.get(part, path)
        expected = clip[1].get(source, fresh[path])
        np.testing.assert_array_equal(array, expected, err_msg=path)
    table = caplog.messages[-1]
    for path, origin in (
        ("vision/class_embedding", "vision_model.embeddings.class_embedding"),
        ("decoder/transformer", "a copy of text/"),
        ("image_encoder/transformer", "a copy of vision/"),
        ("video_adapter/before_attention", "new"),
    ):
        (line,) = (line for line in table.splitlines() if line.startswith(f"{path} "))
        assert origin in line


def test_a_run_from_weights_leaves_out_stages_for_scratch_and_can_be_evaluated(from_clip, tmp_path):
    from_clip.stages, from_clip.stage.blend.steps = ("clip", "blend"), 2
    from_clip.stop_after = 1
    train(from_clip, tmp_path)
    assert [stage for _, stage, _ in losses(tmp_path)] == ["blend"]
    from_clip.stop_after = 0
    results = train(from_clip, tmp_path)  # goes on without looking at the weights again
    assert list(results) == ["blend (validation)", "blend (test)"]
    noted = json.loads((tmp_path / "pretrained.json").read_text())
    assert noted == {"name": from_clip.model.pretrained, "format": "Hugging Face CLIP", "licence": "mit"}
    (row,) = evaluate(evaluation_of(from_clip), tmp_path, None).values()
    assert row == pytest.approx(results["blend (test)"])


def test_weights_of_another_size_are_refused_before_anything_is_written(from_clip, tmp_path):
    from_clip.model.vision.depth = 3
    with pytest.raises(InputError, match=r"model\.vision\.depth: 3 → 2"):
        train(from_clip, tmp_path)
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "tokenizer.json").exists()


def test_clips_tokenizer_comes_with_the_weights(config, tmp_path, assets):
    weights = tmp_path / "clip"
    save_clip(weights, vision=TOWER, text={**TOWER, "vocab_size": 49408, "context_length": 77})
    config.model.text.vocab_size, config.model.text.context_length = 49408, 77
    config.model.pretrained = str(weights / "model.safetensors")
    with pytest.raises(InputError, match=r"tokenizer directory .* lacks vocab\.json and merges\.txt; put them there$"):
        train(config, tmp_path / "run")
    shutil.copy(assets / "clip" / "clip_hf_vocab.json", weights / "vocab.json")
    shutil.copy(assets / "clip" / "clip_hf_merges.txt", weights / "merges.txt")
    config.stages, config.stop_after = ("blend",), 1
    train(config, tmp_path / "run")
    kept = tokenizers.load(tmp_path / "run", 77)
    assert (kept.start, kept.end) == (49406, 49407) and kept.is_clips()

    assert main([f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'hf'}", "--format=clip"]) == 0
    pytorch()
    from transformers import CLIPModel, CLIPTokenizer

    CLIPModel.from_pretrained(tmp_path / "hf")
    texts = ["a dog catches a frisbee", "two   men, talking!"]
    ids, lengths = kept(texts)
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "hf")(texts)["input_ids"]
    assert [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)] == theirs


def test_an_export_holds_the_checkpoint_and_a_run_can_start_from_it(config, finished, tmp_path):
    assert main([f"--checkpoint={finished}", f"--out={tmp_path / 'out'}"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "README.md",
    }
    saved = {name: array for name, array in saved_state(finished).items() if name.startswith("['parameters']")}
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    by_path = {"/".join(part.strip("[]'") for part in n.split("][")[1:]): array for n, array in saved.items()}
    assert by_path.keys() == tensors.keys()
    assert all(np.array_equal(array, tensors[path]) for path, array in by_path.items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "blend (test)" in card and "| adapt | 4 | 8 | `motion/tiny` | video |" in card

    config.model.pretrained = str(tmp_path / "out")
    config.stages, config.stop_after = ("blend",), 1
    train(config, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").read_text() == (finished / "tokenizer.json").read_text()


def test_mistakes_of_the_export_command_are_one_line(finished, tmp_path, capsys):
    assert main([f"--checkpoint={tmp_path}", f"--out={tmp_path / 'out'}"]) == 2
    assert main([f"--checkpoint={finished}", f"--out={finished}"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith("error: no checkpoint at ") and errors[1].endswith("or remove it") and len(errors) == 2
    assert not (tmp_path / "out").exists()


def test_an_earlier_checkpoint_can_be_exported(finished, tmp_path):
    export(finished / "checkpoints" / "6", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["step"] == 6
