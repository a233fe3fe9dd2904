"""The comparisons of `experiments/speed`: that both sides do the same, and that what is wrong is said."""

import io
import pathlib

import av
import jax
import numpy as np
import pytest
from pytorch import pytorch

from experiments.speed import accelerator, children, decode, program, readers, train_step


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
    records = {"blend": {"ours over PyTorch, throughput": 1.3, "MFU": {"ours": 0.45, "PyTorch": 0.3}}}
    found = accelerator.figures(records, lines)
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
    return decode.Clip(path, path.read_bytes(), *decode.asked(path.read_bytes()))


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
