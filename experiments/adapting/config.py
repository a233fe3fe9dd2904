"""One arm of the experiment on feature adapting: a tiny model on `motion`, video stream alone.

    python -m vlab_jax.main --config=experiments/adapting/config.py:conv --workdir=workdir_conv

All arms use the training of `experiments/recipe.py`, without the image stream, since the question is about the video
stream. Except in `positions`, the decoder gets no frame positions: all it knows of time comes from the adapters.
`README.md` describes the arms.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import recipe

BLEND_STEPS = 600
NO_ADAPTER = {"model.adapter.blocks": "none"}
# The fields that differ from the first arm, a convolution over 5 frames in every block.
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
    # CLIP stays frozen, as in the stage before.
    "frozen": {"stage.blend.groups": recipe.tiny(BLEND_STEPS).stage.adapt.groups},
}
# Five seeds for the headline, two for the other arms, so that all runs finish in a night on two cores.
ARMS = {arm: 5 if arm in ("conv", "none") else 2 for arm in CHANGES}
# For `experiments.summary`: the scores in the table, and the pairs of arms that it tests.
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
