"""Evaluates a checkpoint on a split: retrieval in both directions; optionally captions and answers.

    python -m vlab_jax.main --config=configs/evaluate.py --checkpoint=workdir

`--checkpoint` is a run's workdir (its tested checkpoint, or its newest one) or one of its `checkpoints/<step>`. The
data set is the run's own unless `--config.dataset` names another, as in

    --config.dataset=folder:/my/videos --config.split=validation

or the config's argument names a task and a benchmark of `configs/benchmarks.py`:

    --config=configs/evaluate.py:retrieval/msrvtt_1ka,manual_dir=/data/msrvtt

Captions and answers are scored, too, with

    --config.tasks="('retrieval', 'captioning', 'question_answering')"

It prints a table; with `--workdir`, it also writes a report there, and captions and answers into `texts/`.
"""

from ml_collections import ConfigDict

from configs import benchmarks
from configs.fine_tuning import parse
from vlab_jax.config import evaluation_config
from vlab_jax.errors import InputError


def get_config(argument: str = "") -> ConfigDict:
    """The fields of `vlab_jax.config.evaluation_config`, with their defaults or for a benchmark (`retrieval/msvd`)."""
    name, options = parse(argument, "configs/evaluate.py", ("manual_dir",))
    config = evaluation_config()
    if name:
        task, _, name = name.partition("/")
        if task not in benchmarks.BENCHMARKS:
            known = ", ".join(benchmarks.BENCHMARKS)
            raise InputError(f"configs/evaluate.py takes a task and a benchmark, as in retrieval/msvd; tasks: {known}")
        benchmark = benchmarks.find(task, name)
        config.dataset = benchmark.data
        benchmarks.evaluate(config, config.generation, task, benchmark)
    config.data.manual_dir = options.get("manual_dir", "")
    return config
