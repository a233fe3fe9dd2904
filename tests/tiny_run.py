"""A config of a run that takes seconds: `tests/tiny_run.py` as `--config`, or `get_config()`."""

from ml_collections import ConfigDict

from vlab_jax.config import stage_config, training_config

GROUPS = (("^video_adapter/|^decoder/", 3e-3), (".*", "frozen"))


def get_config() -> ConfigDict:
    """Two stages, adapt and blend, of 4 steps each on `motion/tiny`, with a checkpoint every 2 steps."""
    config = training_config()
    tower = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 32, "embed_width": 16}
    config.model.vision.update({"image_size": 16, "patch_size": 8, **tower})
    config.model.text.update({"vocab_size": 300, "context_length": 16, **tower})
    config.model.adapter.update({"width": 8, "heads": 2})
    config.frames, config.image_frames = 4, 2
    config.data.update({"train": ("motion/tiny",), "evaluate": "motion/tiny", "workers": 0})
    config.stages = ("adapt", "blend")
    shared = {"steps": 4, "batch_size": 8, "warmup_steps": 1}
    config.stage.adapt = stage_config(streams=("video",), groups=GROUPS, start_from_clip=True, **shared)
    config.stage.blend = stage_config(groups=((".*", 1e-3),), **shared)
    config.evaluation.batch_size = 8
    config.checkpoint.every = 2
    config.log_every = 1
    config.report.queries = 2
    return config
