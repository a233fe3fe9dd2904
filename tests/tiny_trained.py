"""A run's workdir with a checkpoint of random parameters, as if it had been trained."""

import pathlib

import tiny_run
from tiny_models import random_like

from vlab_jax import config as configuration
from vlab_jax.data.tokenizer import train_bpe
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.runtime.checkpoint import Checkpoints

TEXTS = ["what colour is the red circle?", "a blue square moves left", "how many shapes are there? 2"] * 5


def save_run(workdir: pathlib.Path) -> None:
    """Saves a run of `tiny_run` whose last stage is done."""
    config = configuration.plain(tiny_run.get_config().to_dict())
    model = VLAB.from_fields(configuration.model_fields(config))
    parameters = random_like(parameter_shapes(model, config["frames"]))
    last = parameters["decoder"]["ln_final"]["norm"]  # else its bias makes the same text for every clip
    parameters["decoder"]["ln_final"]["norm"] = {"scale": last["scale"] * 0 + 1, "bias": last["bias"] * 0}
    workdir.mkdir(parents=True, exist_ok=True)
    train_bpe(TEXTS, 300, 16).save(workdir)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(8, {"parameters": parameters}, {"stage": 1}, config)
