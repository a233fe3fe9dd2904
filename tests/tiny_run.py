"""The config of a run that takes seconds: `tests/tiny_run.py` as `--config`, or `get_config()`."""

from ml_collections import ConfigDict

from vlab_jax.config import evaluation_config, stage_config, training_config

GROUPS = (("^video_adapter/|^decoder/", 3e-3), (".*", "frozen"))
TOWER = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 32, "embed_width": 16}
TEXT = {"vocab_size": 300, "context_length": 16, **TOWER}


def evaluation_of(config: ConfigDict) -> ConfigDict:
    """The config that evaluates a checkpoint of a run."""
    made = evaluation_config()
    made.data.directory, made.data.workers = config.data.directory, 0
    made.batch_size = config.evaluation.batch_size  # another one rounds differently, and ranks depend on that
    return made


def get_config() -> ConfigDict:
    """Two stages, adapt and blend, of 4 steps each on `motion/tiny`; every second step has a checkpoint, and all are
    kept."""
    config = training_config()
    config.model.vision.update({"image_size": 16, "patch_size": 8, **TOWER})
    config.model.text.update(TEXT)
    config.model.adapter.update({"width": 8, "heads": 2})
    config.frames, config.image_frames = 4, 2
    config.data.update({"train": ("motion/tiny",), "evaluate": "motion/tiny", "workers": 0})
    config.stages = ("adapt", "blend")
    shared = {"steps": 4, "batch_size": 8, "warmup_steps": 1}
    config.stage.adapt = stage_config(streams=("video",), groups=GROUPS, start_from_clip=True, **shared)
    config.stage.blend = stage_config(groups=((".*", 1e-3),), **shared)
    config.evaluation.batch_size = 8
    config.checkpoint.update({"every": 2, "keep": 4})
    config.log_every = 1
    config.report.queries = 2
    return config
