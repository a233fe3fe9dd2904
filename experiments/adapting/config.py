"""One arm of the experiment on feature adapting: a tiny model on `motion`, video stream alone.

    python -m vlab_jax.main --config=experiments/adapting/config.py:conv --workdir=workdir_conv

All arms train as `experiments/recipe.py` says; the image stream is left out, since the question is about the video
stream. In all but `positions` the decoder is not told which frame a token is of: what it knows of time, adapters wrote.
`README.md` says what the arms are for.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import recipe

BLEND_STEPS = 600
NO_ADAPTER = {"model.adapter.blocks": "none"}
# The fields in which each arm differs from the first, a convolution over 5 frames in every block.
CHANGES: dict[str, dict[str, Any]] = {
    "conv": {},
    "none": NO_ADAPTER,
    "positions": {**NO_ADAPTER, "model.decoder.frame_positions": True},
    "attention": {"model.adapter.mixer": "attention"},
    "last_1": {"model.adapter.blocks": "last:1"},
    "last_2": {"model.adapter.blocks": "last:2"},
    "frames_2": {"frames": 2},
    "frames_4": {"frames": 4},
    "frames_16": {"frames": 16},
    "kernel_1": {"model.adapter.kernel": (1, 1, 1)},
    "kernel_3": {"model.adapter.kernel": (3, 1, 1)},
    # CLIP stays as its stills taught it, as in the stage before.
    "frozen": {"stage.blend.groups": recipe.tiny(BLEND_STEPS).stage.adapt.groups},
}
# Five seeds where the headline is; two for what it depends on, so that all of it is done in a night on two cores.
ARMS = {arm: 5 if arm in ("conv", "none") else 2 for arm in CHANGES}
# What `experiments.summary` shows, and which arms it compares.
ROW, FIGURES = recipe.ROW, recipe.FIGURES
COMPARED = (("conv", "none"), ("conv", "positions"), ("conv", "attention"), ("conv", "frozen"))


def get_config(arm: str = "conv") -> ConfigDict:
    """The config of an arm.

    Raises:
      InputError: there is no such arm.
    """
    recipe.check_arm("adapting", arm, CHANGES)
    config = recipe.tiny(BLEND_STEPS)
    config.model.decoder.frame_positions = False
    config.image_frames = 1
    config.update_from_flattened_dict({**recipe.VIDEO_ALONE, **CHANGES[arm]})
    return config
