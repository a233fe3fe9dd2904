"""Evaluates a checkpoint with the config that it was saved with: `--config=configs/evaluate.py` runs this."""

import functools
import logging
import pathlib

import jax
from ml_collections import ConfigDict

from vlab_jax.data import pipeline, sampling, sources
from vlab_jax.data import tokenizer as tokenizers
from vlab_jax.data.batches import PrefetchMemory, plan_prefetch
from vlab_jax.data.crash_guard import default_workers
from vlab_jax.data.media import MediaLimits
from vlab_jax.datasets import registry
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.evaluation.encoder import Encoder
from vlab_jax.evaluation.plan import Plan
from vlab_jax.evaluation.report import format_table, write_report
from vlab_jax.restore import Restored, restore
from vlab_jax.runtime import metrics, sharding
from vlab_jax.runtime.disk import write_json


def evaluate(config: ConfigDict, checkpoint: pathlib.Path, workdir: pathlib.Path | None) -> dict[str, dict[str, float]]:
    """Prints the table of a checkpoint on a split; with a workdir, writes a report.

    Args:
      config: fields of `config.evaluation_config`, checked.

    Raises:
      InputError: there is no such checkpoint, or the data cannot be read.
    """
    whole_mesh = sharding.make_mesh(**config.mesh)
    restored, mesh = restore(checkpoint, whole_mesh), sharding.local_mesh(whole_mesh)
    saved, stage, encoder = restored.config, restored.stage, _encoder(config, restored, mesh)
    dataset, split = config.dataset or saved["data"]["evaluate"], config.split
    options, retry_seconds = BuildOptions.from_fields(dict(config.data)), config.data.retry_seconds
    open_split = functools.partial(registry.open_split, options=options, retry_seconds=retry_seconds)
    with jax.set_mesh(mesh), jax.default_matmul_precision(saved["matmul_precision"]):
        with sharding.primary_first("data"):
            source = open_split(dataset, split)
        trained = sources.parse_mixture(saved["stage"][stage]["train"] or saved["data"]["train"])
        plan = Plan.of(
            dict(config),
            dict(config.generation),
            encoder.tokenizer,
            lambda: [open_split(spec, "train") for spec, _ in trained],
        )
        outcome = plan.evaluate(encoder, source, workdir / "texts" if workdir and sharding.is_primary() else None)
        # Figures on the data that their checkpoint was selected on are marked; configs of older runs lack the field.
        on_test = saved["checkpoint"].get("select_on") == split == "test" and dataset == saved["data"]["evaluate"]
        mark = ", selected on test" if on_test else ""
        results = outcome.by_row(f"{stage}, step {restored.step} ({dataset} {split}{mark})")
        if workdir is None and sharding.is_primary():
            print(format_table(results))
        elif sharding.is_primary():
            record, queries = restored.home / metrics.METRICS_FILE, config.report.queries
            write_report(workdir / "report", "Evaluation", record, results, outcome, source, encoder.frames, queries)
            write_json(workdir / "results.json", results)
    return results


def _encoder(config: ConfigDict, restored: Restored, mesh: jax.sharding.Mesh) -> Encoder:
    """The model of a checkpoint with the frames it was trained on, on this process's own devices."""
    saved = restored.config
    limits = MediaLimits(**config.data.limits)
    frames = pipeline.FrameOptions(saved["frames"], saved["model"]["vision"]["image_size"], config.data.short, limits)
    workers = default_workers(config.data.workers)
    memory = PrefetchMemory(config.data.prefetch_gigabytes)
    plan = plan_prefetch(memory, batch=config.batch_size, frame_bytes=frames.nbytes, workers=workers)
    if plan.note:
        logging.warning("%s", plan.note)
    return Encoder(
        restored.model,
        sharding.copy_to_local_mesh(restored.parameters, mesh),
        tokenizers.load(restored.home, saved["model"]["text"]["context_length"]),
        frames,
        tuple(config.streams) or tuple(saved["stage"][restored.stage]["streams"]),
        sampling.sample_image_frames(saved["frames"], saved["image_frames"]),
        mesh,
        config.batch_size,
        workers,
        memory,
        config.data.max_failed_share,
        config.split,
    )
