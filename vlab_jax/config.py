"""Every field of a config with its default.

`configs/*.py` start from these trees and change some fields; `config_check.py` checks the result. Fields
marked *reconstruction* are our choices: of VLAB's paper, only the abstract is known to us.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from vlab_jax.errors import InputError


def training_config() -> ConfigDict:
    """The fields of a training run. `stages` names the stages in order; `stage.<name>` holds the fields of each."""
    return ConfigDict(
        {
            "task": "train",
            "seed": 0,
            # The type of matrix products; parameters, softmax, norms and losses are float32.
            "dtype": "float32",
            # `auto`: attention by the accelerator's own kernel, if it supports the shapes and types and agrees with
            # plain attention before the first step; `xla`: never.
            "attention": "auto",
            # Precision of float32 matrix products on accelerators (jax.default_matmul_precision); similarities are
            # always in full float32.
            "matmul_precision": "default",
            # Frames of a clip, and how many of them the image stream uses (reconstruction).
            "frames": 8,
            "image_frames": 4,
            "model": {
                # Weights to start from: a .safetensors file, a directory or a model name of a CLIP (Hugging Face,
                # OpenCLIP, EVA-CLIP), or a directory that vlab_jax.export wrote. Empty: random weights.
                "pretrained": "",
                # Fields of models.towers.VisionTower and TextTower.
                "vision": {
                    "image_size": 224,
                    "patch_size": 32,
                    "width": 768,
                    "depth": 12,
                    "heads": 12,
                    "mlp_width": 3072,
                    "embed_width": 512,
                    "activation": "quick_gelu",
                    "epsilon": 1e-5,
                    "pre_norm": True,
                    "patch_bias": False,
                    "key_bias": True,
                    "projection_bias": False,
                    "gated_mlp": False,
                    "inner_norms": False,
                    "rotary_grid": 0,
                },
                "text": {
                    "vocab_size": 49408,
                    "context_length": 77,
                    "width": 512,
                    "depth": 12,
                    "heads": 8,
                    "mlp_width": 2048,
                    "embed_width": 512,
                    "activation": "quick_gelu",
                    "epsilon": 1e-5,
                    "token_deviation": 0.02,
                },
                # Fields of models.video_adapter.VideoAdapter (reconstruction). `blocks` are the vision blocks that
                # carry one: all, none, every:n (each n-th), last:n, or numbers from 0 as in '0,4,8'.
                "adapter": {
                    "blocks": "all",
                    "before_mlp": False,
                    "width": 384,
                    "mixer": "conv",
                    "kernel": (3, 1, 1),
                    "heads": 6,
                    "activation": "gelu",
                },
                # Fields of models.decoder.MultimodalDecoder (reconstruction).
                "decoder": {"blending": "concat", "cross_attention_every": 1, "frame_positions": True},
                # Whether the image stream shares the video stream's CLIP parameters (reconstruction), and its
                # weight in the video embedding (reconstruction).
                "image_encoder": "shared",
                "embedding_blend": 0.5,
                # How frame embeddings become a video's: mean_then_normalise, or normalise_then_mean (each frame at unit
                # length first, as in CLIP4Clip).
                "frame_pooling": "mean_then_normalise",
                "remat": "none",
                "unroll": 1,
            },
            # `bpe` is trained on the training texts, with model.text.vocab_size ids at most; `clip` is read from
            # `path`, a directory or a model name of CLIP's tokenizer (empty: the folder of the weights). `auto`: `clip`
            # with model.pretrained, and `bpe` without.
            "tokenizer": {"kind": "auto", "path": ""},
            "data": {
                # Data sets to train on: 'name', 'name/variant', 'folder:/a/directory'; several with weights, as
                # ('motion@0.7', 'folder:/a/directory@0.3').
                "train": ("motion",),
                # The data set whose `validation` and `test` splits are evaluated.
                "evaluate": "motion",
                **_data_fields(),
            },
            "stages": (),
            "stage": {},
            "evaluation": {"batch_size": 32, **_scored()},
            "generation": generation_config(),
            # Devices per axis of the mesh; -1: all that remain.
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "checkpoint": {
                # Steps between checkpoints, and how many of the newest are kept, besides the best so far.
                "every": 500,
                "keep": 3,
                # The checkpoint to test: the best on `validation` data among the evaluations of the last stage
                # (stage.evaluate_every, and its end), or the `last`. A checkpoint selected on `test` data has figures
                # that are too good: this is refused without i_select_on_test_data, and marked in every table with it.
                "select_on": "validation",
                "i_select_on_test_data": False,
                # The figure to select by; empty: the default figure of the first task (evaluation.registry).
                "select_by": "",
            },
            "log_every": 10,
            # Steps in a row that may be skipped because gradients are not finite, before the run stops.
            "most_skipped": 5,
            # Stop after this many steps in all, as if interrupted; 0: run to the end.
            "stop_after": 0,
            # Queries on the retrieval contact sheet of the report.
            "report": {"queries": 8},
        }
    )


def _scored() -> dict[str, Any]:
    """The fields of evaluations, in a run and of a checkpoint."""
    return {
        # Names in evaluation.registry.TASKS.
        "tasks": ("retrieval",),
        # Types of questions that retrieval answers by similarity, and question answering leaves out.
        "multiple_choice": ("twin",),
        # Size of the closed list that question answering ranks besides free generation: the most frequent answers of
        # the training split; 0: none is ranked. `answer_list`: a JSON file with a list to rank instead.
        "closed_list": 1000,
        "answer_list": "",
        # How many of the clips that retrieval ranks first are re-ranked by the decoder's likelihood of the query, in a
        # row of their own; 0: none.
        "rerank": 0,
        # Further rows of retrieval, whose ranking of a query uses others: `dual_softmax` those of the test,
        # `querybank` training captions. Never the headline; see `evaluation.retrieval_metrics`.
        "query_normalisation": (),
        "dual_softmax_temperature": 0.01,
        # Training captions in the bank (reconstruction: QB-Norm takes all), and the factor of their cosines.
        "querybank_size": 10_000,
        "querybank_beta": 20.0,
    }


def _data_fields() -> dict[str, Any]:
    """How data sets are prepared, and how their clips are read and decoded ahead of the model."""
    return {
        # Where data sets are built; empty: TFDS's default.
        "directory": "",
        # The folder of official annotation files and media: <manual_dir>/<data set>/, or manual_dir itself.
        "manual_dir": "",
        # Leave out clips of official data sets whose media are missing, instead of refusing to build.
        "allow_missing": False,
        # What is stored: `file`, the encoded files as obtained; `frames`, JPEGs: frame_rate a second, short_side pixels
        # on the short side.
        "variant": "file",
        "frame_rate": 4.0,
        "short_side": 256,
        "jpeg_quality": 90,
        # Limits for reading and decoding one clip; see `data.media.MediaLimits`.
        "limits": {
            "max_pixels": 66_355_200,
            "max_frames": 2_592_000,
            "max_seconds": 90_000.0,
            "max_bytes": 2_147_483_647,
            "decode_seconds": 600.0,
        },
        # Worker processes that decode; -1: two fewer than the cores, shared by the processes of a run on one host; 0:
        # threads.
        "workers": -1,
        # GiB of host memory for batches made ahead, including what worker processes hold, for all processes of a run on
        # one host. In a run, training and evaluation have a half each. Workers without room are not started.
        "prefetch_gigabytes": 8.0,
        # The share of clips that may fail to decode before the run stops.
        "max_failed_share": 0.01,
        # Seconds for which reads of the records are retried during an outage, before the run stops.
        "retry_seconds": 300.0,
        # Media with too few frames: repeat frames, or fail.
        "short": "repeat",
    }


def generation_config() -> ConfigDict:
    """How captions are generated in evaluation; see `models.generation.GenerationConfig`."""
    return ConfigDict(
        {
            "beams": 3,
            "length_penalty": 1.0,
            # Tokens of a caption, its end included; 0: as many as the text tower has positions.
            "max_tokens": 0,
        }
    )


def stage_config(**fields: Any) -> ConfigDict:
    """The fields of one stage; `fields` replace defaults (`InputError` if a stage has no such field)."""
    config = ConfigDict(
        {
            "steps": 1000,
            "batch_size": 64,
            # Parts of the batch that go through the model one after the other, for batches too large for memory; the
            # contrastive loss still compares all clips of the batch with all texts.
            "micro_batches": 1,
            # Columns of the batch's similarities that exist at once; 0: all.
            "contrastive_chunk": 0,
            # Data sets of this stage; empty: data.train.
            "train": (),
            # Frames of a clip in this stage; 0: the run's.
            "frames": 0,
            "streams": ("video", "image"),
            # Ordered (pattern, peak learning rate or 'frozen'); the first pattern found in a parameter's path decides.
            "groups": ((".*", 1e-4),),
            # Parameters that no objective of the stage uses, such as the text tower's in captioning: `frozen`, or
            # `decay`: they have no gradient, but weight decay shrinks them.
            "unused": "decay",
            "warmup_steps": 50,
            "end_learning_rate_share": 0.0,
            "weight_decay": 0.05,
            "clip_norm": 1.0,
            "b1": 0.9,
            "b2": 0.98,
            # Decay of a moving average of the parameters, which is evaluated in their place; 0: none.
            "average_decay": 0.0,
            # Weights of the objectives; 0 leaves one out.
            "objectives": {"contrastive": 1.0, "captioning": 1.0, "masked_lm": 1.0, "question_answering": 0.0},
            # Questions of a clip in one step (reconstruction).
            "questions_per_clip": 1,
            "label_smoothing": 0.1,
            "masked_share": 0.15,
            # Leave this stage out if model.pretrained is set.
            "only_from_scratch": False,
            # First copy CLIP's towers into the decoder and a separate image encoder.
            "start_from_clip": False,
            # Steps between evaluations on validation data; 0: only at the stage's end.
            "evaluate_every": 0,
            # The tasks evaluated after this stage; empty: evaluation.tasks.
            "evaluate": (),
        }
    )
    check_keys(fields, config.to_dict(), "stage_config")
    config.update(fields)
    return config


def evaluation_config() -> ConfigDict:
    """The fields of an evaluation of a checkpoint, whose own config describes the model."""
    return ConfigDict(
        {
            "task": "evaluate",
            # The data set and the split; an empty data set: that of the run.
            "dataset": "",
            "split": "test",
            # Streams of the video embedding; empty: those of the last stage.
            "streams": (),
            "batch_size": 32,
            **_scored(),
            "generation": generation_config(),
            "data": _data_fields(),
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "report": {"queries": 8},
        }
    )


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises InputError for the first unknown key, naming the nearest known one."""
    for key in given:
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
            raise InputError(f"unknown key {key!r} in {where}; {hint}")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word with the most similar spelling, if one is similar."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)), None)


def resolved(config: ConfigDict) -> ConfigDict:
    """A copy of a training config with the stages (`InputError` if none remains) and the tokenizer that
    `model.pretrained` implies."""
    made = config.copy_and_resolve_references()
    if made.model.pretrained:
        made.stages = tuple(name for name in made.stages if not made.stage[name].only_from_scratch)
    if not made.stages:
        raise InputError("config.stages holds only stages that config.model.pretrained leaves out")
    if made.tokenizer.kind == "auto":
        made.tokenizer.kind = "clip" if made.model.pretrained else "bpe"
    return made


def adapted_blocks(spec: str, depth: int) -> tuple[int, ...]:
    """The vision blocks that carry an adapter: `all`, `none`, `every:n` (each n-th), `last:n`, or numbers from 0 as in
    `0,4,8`; raises `InputError` if `spec` is something else, or names a block beyond `depth`."""
    kind, _, number = spec.partition(":")
    try:
        if spec in ("all", "none"):
            return tuple(range(depth)) if spec == "all" else ()
        if kind == "every":
            blocks = tuple(range(int(number) - 1, depth, int(number)))
        elif kind == "last":
            blocks = tuple(range(depth - int(number), depth))
        else:
            blocks = tuple(sorted({int(block) for block in spec.split(",")}))
    except ValueError:
        blocks = (-1,)
    if not blocks or blocks[0] < 0 or blocks[-1] >= depth:
        raise InputError(
            f"config.model.adapter.blocks is {spec!r}; it must be all, none, every:n, last:n or numbers from 0 to "
            f"{depth - 1} as in '0,2'"
        )
    return blocks


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config as JSON has them: dictionaries, lists, numbers, strings."""
    return json.loads(json.dumps(config))


def model_fields(config: Mapping[str, Any], platform: str = "cpu") -> dict[str, Any]:
    """The arguments of `models.vlab.VLAB` from a training config or its JSON, for a platform of devices."""
    fields = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config["model"].items()}
    adapter = fields["adapter"]
    adapter["blocks"] = adapted_blocks(adapter["blocks"], fields["vision"]["depth"])
    adapter["kernel"] = tuple(adapter["kernel"])
    fields.pop("pretrained", None)
    attention = config.get("attention", "auto")  # configs of earlier runs lack it
    return fields | {"frames": config["frames"], "dtype": config["dtype"], "platform": platform, "attention": attention}
