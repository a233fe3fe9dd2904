"""One arm of the experiment on feature adapting: a tiny model on `motion`, video stream alone.

    python -m vlab_jax.main --config=experiments/adapting/config.py:conv --workdir=workdir_conv

All arms train as `configs/pretrain.py` does, with several questions a clip; the image stream is left out, since the
question is about the video stream. In all but `positions` the decoder is not told which frame a token is of: what it
knows of time, adapters wrote. `README.md` says what the arms are for.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import pretrain
from vlab_jax.errors import InputError

BLEND_STEPS = 1000


def _conv(config: ConfigDict) -> None:
    """The default: a convolution over 5 frames, in every block."""


def _none(config: ConfigDict) -> None:
    """No adapter: frames are a bag."""
    config.model.adapter.blocks = "none"


def _positions(config: ConfigDict) -> None:
    """No adapter, but the decoder learns a position for each frame."""
    config.model.adapter.blocks = "none"
    config.model.decoder.frame_positions = True


def _attention(config: ConfigDict) -> None:
    """Self-attention over time in place of the convolution."""
    config.model.adapter.mixer = "attention"


def _frozen(config: ConfigDict) -> None:
    """CLIP stays as its stills taught it; adapters and decoder learn."""
    learned = [group for group in config.stage.blend.groups if group[0] in ("^video_adapter/", "^decoder/")]
    config.stage.blend.groups = (*learned, (".*", "frozen"))


def _blocks(blocks: str) -> Callable[[ConfigDict], None]:
    def change(config: ConfigDict) -> None:
        config.model.adapter.blocks = blocks

    return change


def _frames(frames: int) -> Callable[[ConfigDict], None]:
    def change(config: ConfigDict) -> None:
        config.frames = frames

    return change


def _kernel(frames: int) -> Callable[[ConfigDict], None]:
    def change(config: ConfigDict) -> None:
        config.model.adapter.kernel = (frames, 1, 1)

    return change


_CHANGES: dict[str, Callable[[ConfigDict], None]] = {
    "conv": _conv,
    "none": _none,
    "positions": _positions,
    "attention": _attention,
    "last_1": _blocks("last:1"),
    "last_2": _blocks("last:2"),
    "frames_2": _frames(2),
    "frames_4": _frames(4),
    "frames_16": _frames(16),
    "kernel_1": _kernel(1),
    "kernel_3": _kernel(3),
    "frozen": _frozen,
}
# Five seeds where the headline is; three for what it depends on.
ARMS = {arm: 5 if arm in ("conv", "none") else 3 for arm in _CHANGES}
# What `experiments.summary` shows, and which arms it compares.
ROW = "blend (test)"
FIGURES = {
    "R@1": "text_to_video/R@1",
    "twins": "twin_accuracy",
    "CIDEr": "CIDEr",
    "QA appearance": "QA appearance",
    "QA motion": "QA motion",
    "QA order": "QA order",
}
COMPARED = (("conv", "none"), ("conv", "positions"), ("conv", "attention"), ("conv", "frozen"))


def get_config(arm: str = "conv") -> ConfigDict:
    """The config of an arm.

    Raises:
      InputError: there is no such arm.
    """
    if arm not in _CHANGES:
        raise InputError(f"experiments/adapting/config.py takes one of {', '.join(_CHANGES)}, not {arm!r}")
    config = pretrain.get_config("tiny")
    config.model.decoder.blending = "none"
    config.model.decoder.frame_positions = False
    config.image_frames = 1
    config.stage.blend.update({"streams": ("video",), "steps": BLEND_STEPS, "questions_per_clip": 4})
    config.generation.beams = 1
    config.evaluation.closed_list = 0
    _CHANGES[arm](config)
    return config
