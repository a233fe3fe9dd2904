"""Evaluates a checkpoint on a split: retrieval in both directions, and the twins of `motion`; captions and answers too.

    python -m vlab_jax.main --config=configs/evaluate.py --checkpoint=workdir

`--checkpoint` is a run's workdir (the checkpoint it was tested with, or its newest) or one of its
`checkpoints/<step>`. The data set is the run's own unless `--config.dataset` names another, as in

    --config.dataset=folder:/my/videos --config.split=validation

What the model writes is scored with

    --config.tasks="('retrieval', 'captioning', 'question_answering')"

It prints a table; with `--workdir`, it also writes a report there, and captions and answers into `texts/`.
"""

from ml_collections import ConfigDict

from vlab_jax.config import evaluation_config


def get_config() -> ConfigDict:
    """The fields of `vlab_jax.config.evaluation_config`, unchanged."""
    return evaluation_config()
