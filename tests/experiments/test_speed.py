"""The comparisons of `experiments/speed`: that both sides do the same, and that what is wrong is said."""

import contextlib
import importlib
import io
import json
import os
import pathlib
import sys

import av
import jax
import numpy as np
import pytest
from pytorch import pytorch

from configs import pretrain
from experiments.speed import accelerator, attention, children, decode, program, readers, steps, train_step


@pytest.fixture(scope="module")
def step():
    """A `blend` step of one block a tower."""
    config = program.configured("tiny", "blend", 2, frames=2)
    config.model.vision.depth = config.model.text.depth = 1
    return program.prepared(config, "blend", program.one_device())


def test_the_pytorch_model_takes_the_same_step(step):
    """Loss, gradient norm, number of parameters and FLOPs; `measured` refuses a difference above 1e-4."""
    pytorch().set_num_threads(1)  # beside other tests, two would wait for each other
    found = train_step.measured(step, "blend", repeats=1)
    assert max(found["differences"].values()) < 1e-4
    assert found["PyTorch's FLOPs over ours"] == pytest.approx(1, abs=0.05)
    assert found["ours over PyTorch, throughput"] == pytest.approx(
        found["seconds"]["PyTorch"] / found["seconds"]["ours"]
    )
    assert found["TFLOP/s"]["ours"] == pytest.approx(step.stage.cost.flops / found["seconds"]["ours"] / 1e12)
    assert found["clips"] == 2 and found["frames"] == 2 and "MFU" not in found


def test_two_models_that_differ_are_refused():
    ours = {"loss": 1.0, "gradient_norm": 2.0}
    assert train_step.same({"ours": ours, "PyTorch": ours}, 1e-4) == {"loss": 0, "gradient_norm": 0}
    with pytest.raises(ValueError, match="differ"):
        train_step.same({"ours": ours, "PyTorch": {**ours, "gradient_norm": 2.1}}, 1e-2)


def test_a_parameter_that_only_one_of_the_models_has_is_named(step):
    pytorch()
    from experiments.speed.torch_vlab import VlabLoss, load

    fields = {name: getattr(step.model, name) for name in ("vision", "text", "decoder", "adapter", "frames")}
    fields |= {"image_encoder": "separate", "embedding_blend": 0.5}
    shapes = step.stage.shapes.parameters
    parameters = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    without = {name: each for name, each in parameters.items() if name != "logit_scale"}
    with pytest.raises(ValueError, match=r"not filled: \['logit_scale'\]"):
        load(VlabLoss(fields, ("video",), (0,), 0.1), without)
    with pytest.raises(ValueError, match="knows"):
        VlabLoss({**fields, "image_encoder": "shared"}, ("video",), (0,), 0.1)


def test_goals_are_reached_missed_or_not_measured():
    lines = [{"input_wait_share": share, "clips_per_second": 10.0, "mfu": 0.4} for share in (0.01, 0.02)]
    peers = {"blend": {"ours over PyTorch, throughput": 1.3}}
    found = accelerator.figures({"blend": {"MFU": 0.45}, "adapt": {"failed": "no room"}}, peers, lines)
    assert found["share of waiting for clips"] == pytest.approx(0.015)
    assert found["MFU of the run"] == pytest.approx(0.4)
    said = {
        line.split("|")[1].strip(): line.split("|")[4].strip() for line in accelerator.table(found).splitlines()[2:]
    }
    assert said == {
        "MFU, blend": "missed",
        "MFU, adapt": "not measured here",
        "ours over PyTorch, blend": "reached",
        "share of waiting for clips": "reached",
    }


def in_this_process(module: str, arguments, **_):
    """`children.answer` without the seconds that a process takes to start."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [module, *arguments])
        importlib.import_module(module).main()
    return json.loads(printed.getvalue().splitlines()[-1])


@pytest.fixture(scope="module")
def small_adapt():
    """The record of two steps of `adapt` at the tiny size, with one block a tower."""

    def small(size: str):
        config = pretrain.get_config(size)
        config.model.vision.depth = config.model.text.depth = config.model.decoder.cross_attention_every = 1
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "get_config", small)
        given = ["--size=tiny", "--stage=adapt", "--batch=2", "--dtype=float32", "--steps=2"]
        return in_this_process("experiments.speed.steps", given)


def test_steps_on_random_arrays_say_speed_and_memory(small_adapt):
    memory = small_adapt["memory by the compiler"]
    assert small_adapt["clips"] == small_adapt["clips requested"] == 2
    assert small_adapt["steps that were not finite"] == 0
    assert small_adapt["clips a second"] == pytest.approx(2 / small_adapt["seconds"])
    assert small_adapt["TFLOP/s"] == pytest.approx(small_adapt["model FLOPs"] / small_adapt["seconds"] / 1e12)
    assert memory["needed"] > memory["temp"] > 0 and "MFU" not in small_adapt


@pytest.fixture
def accelerated(monkeypatch, tmp_path):
    """Runs `accelerator` with an `answer` in the place of its children's; gives its one record and that one's name."""

    def run(answer, *arguments: str):
        monkeypatch.setattr(children, "answer", answer)
        given = ["--size=tiny", "--dtype=float32", "--cases=1", f"--out={tmp_path}/records.json", *arguments]
        monkeypatch.setattr(sys, "argv", ["accelerator", *given])
        accelerator.main()
        ((name, record),) = json.loads((tmp_path / "records.json").read_text()).items()
        return name, record

    return run


def test_all_that_is_asked_of_an_accelerator_is_recorded_beside_what_was_compiled(
    accelerated, small_adapt, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(attention, "cases", lambda seed: iter([attention.Case(5, 5, 2, 24, True, None, "float32")]))
    called = []

    def answer(module: str, arguments, **options):
        called.append(arguments)
        return small_adapt if module.endswith("steps") else in_this_process(module, arguments)

    (tmp_path / "compiled.json").write_text('{"blend": {"temporaries": 1}}')
    name, record = accelerated(answer, "--blend=3", f"--compiled={tmp_path}/compiled.json")
    assert name == "tiny, float32, cpu" and record["vlab_jax.compile"] == {"blend": {"temporaries": 1}}
    assert record["adapt"] == small_adapt and record["attention"]["cases"] == 1 and record["figures"] == {}
    assert called[1] == ["--size=tiny", "--dtype=float32", "--steps=20", "--stage=blend", "--batch=3"]
    said = capsys.readouterr().out
    assert "| adapt | 2 |" in said and "attention: 1 cases, 0 findings" in said


def test_a_part_that_fails_leaves_the_others_and_is_reported(accelerated, capsys):
    def answer(module: str, arguments, **options):
        if "--stage=adapt" in arguments:
            raise RuntimeError("no kernel\nfor this device")
        if module.endswith("attention"):
            return {"cases": 2, "wrong": ["its output is off"], "device": "GPU"}
        assert options["timeout"] <= 8 * 60 and options["environment"]["JAX_PLATFORMS"] == os.environ["JAX_PLATFORMS"]
        memory = {"memory by the compiler": {"needed": 2**31}, "memory of the device": {"peak_bytes_in_use": 2**30}}
        return {"clips": 2, "seconds": 0.5, "clips a second": 4.0, "MFU": 0.25, "device": "GPU", **memory}

    with pytest.raises(SystemExit):
        accelerated(answer)
    said = capsys.readouterr().out
    assert "| adapt | failed: for this device |" in said and "| blend | 2 | 500.0 | 4.0 | 25.0 % | 1.0 | 2.0 |" in said
    assert "attention: 2 cases, 1 findings\nits output is off" in said


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    def measured(config, stage, count):
        clips = config.stage[stage].batch_size
        if clips > 2:
            raise steps.TooLarge(f"{clips} are too many")
        return {"clips": clips}

    monkeypatch.setattr(steps, "measured", measured)
    found = steps.fitting("tiny", "blend", 9, "float32", 1)
    assert found["clips"] == 2 and found["clips requested"] == 9
    assert found["refused"] == {9: "9 are too many", 4: "4 are too many"}
    assert steps.needed({"argument": 10, "output": 9, "alias": 8, "temp": 5}) == 16


def causal_forgotten(*given, causal, kv_lengths):
    return attention.on_this_device(*given, causal=False, kv_lengths=kv_lengths)


def last_key_forgotten(query, key, value, **options):
    return attention.on_this_device(query, key[:, :-1], value[:, :-1], **options)


def half_gradient(query, key, value, **options):
    halved = value / 2 + jax.lax.stop_gradient(value / 2)
    return attention.on_this_device(query, key, halved, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_attention_is_compared_with_plain_attention_and_a_wrong_one_is_noticed(dtype):
    def case(queries, keys, causal=False, lengths=None):
        return attention.Case(queries, keys, 2, 24, causal, lengths, dtype)

    for right in (
        case(5, 5, causal=True, lengths=(0, 1, 5)),
        case(1, 20),
        case(3, 1),
        case(40, 60, lengths=(0, 60, 7)),
    ):
        assert max(attention.off(right).values()) <= 1, right
    for wrong, given in (
        (causal_forgotten, case(60, 60, causal=True)),
        (last_key_forgotten, case(60, 60)),
        (half_gradient, case(5, 5)),
    ):
        assert max(attention.off(given, wrong).values()) > 1, wrong


def test_a_child_that_fails_says_what_it_said():
    with pytest.raises(RuntimeError, match=r"(?s)experiments\.nothing --x failed:.*No module named"):
        children.answer("experiments.nothing", ["--x"])


def numbered(count: int) -> bytes:
    """A video whose frames are ever brighter."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(count):
            picture = np.full((32, 32, 3), 40 + 5 * number, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / "numbered.mp4"
    path.write_bytes(numbered(24))
    return decode.Clip(path, path.read_bytes(), *decode.sampled_frames(path.read_bytes()))


def test_the_frames_asked_for_are_the_centres_of_equal_segments(clip):
    assert clip.count == 24 and clip.numbers == tuple(range(1, 24, 3))
    levels = decode.read("ours", clip).mean(axis=(1, 2, 3))
    assert np.abs(levels - (40 + 5 * np.array(clip.numbers))).max() < 2.5


@pytest.mark.parametrize("name", [name for name in readers.READERS if name != "ours"])
def test_the_other_libraries_read_the_frames_that_are_asked_for(clip, name):
    pytest.importorskip(
        "cv2" if name.startswith("OpenCV") else "torchcodec", exc_type=(ImportError, RuntimeError, OSError)
    )
    assert np.abs(decode.read(name, clip).astype(int) - decode.read("ours", clip)).mean() < 2


def test_who_reads_other_frames_or_none_is_listed(clip, monkeypatch):
    def late(media: bytes, path: pathlib.Path, numbers):
        return readers.ours(media, path, [*numbers[:-1], numbers[-1] - 2])

    def never(*_):
        raise readers.NotRead("no frame 3")

    monkeypatch.setattr(decode, "READERS", {"ours": readers.ours, "late": late, "never": never})
    found = decode.disagreements(clip, close=4.0)
    assert found["late"].startswith("1 of 8 frames differ") and found["never"] == "fails: no frame 3"
    assert set(found) == {"late", "never"}
