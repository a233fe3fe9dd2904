"""The common part of the experiments: the training of their tiny models (`configs/pretrain.py`, on the clips of
`:long`), and the scores in their tables.
"""

from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from configs import pretrain
from vlab_jax.errors import InputError

# The row of a run's results that is shown, and its scores by their headings.
ROW = "blend (test)"
FIGURES = {
    "R@1": "text_to_video/R@1",
    "twins": "twin_accuracy",
    "CIDEr": "CIDEr",
    "QA appearance": "QA appearance",
    "QA motion": "QA motion",
    "QA order": "QA order",
}

# The fields that an arm changes to use the video stream alone.
VIDEO_ALONE: dict[str, Any] = {"model.decoder.blending": "none", "stage.blend.streams": ("video",)}


def tiny(steps: int) -> ConfigDict:
    """A tiny model on `motion/large`, trained end to end; `steps` are those of the last stage."""
    config = pretrain.get_config("tiny,end_to_end")
    config.model.decoder.blending = "concat"  # the default when the arms ran; `experiments/blending` led to another
    config.data.train = ("motion/large",)
    config.stage.blend.steps = steps
    for name in config.stages:
        config.stage[name].unused = "decay"  # the default when the arms ran
    config.evaluation.closed_list = 0
    config.generation.beams = 1
    return config


def check_arm(experiment: str, arm: str, arms: Collection[str]) -> None:
    """Raises InputError if an experiment has no such arm."""
    if arm not in arms:
        raise InputError(f"experiments/{experiment}/config.py takes one of {', '.join(arms)}, not {arm!r}")
