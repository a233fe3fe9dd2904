"""Evaluates a checkpoint, by the config that it was saved with: what `--config=configs/evaluate.py` runs."""

import logging
import pathlib

import jax
from ml_collections import ConfigDict

from vlab_jax.data import pipeline, sampling, sources
from vlab_jax.data import tokenizer as tokenizers
from vlab_jax.data.crash_guard import default_workers
from vlab_jax.data.media import MediaLimits
from vlab_jax.data.pieces import PrefetchMemory, free_shared_memory, plan_prefetch
from vlab_jax.datasets import registry
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.evaluation import encoder as evaluation
from vlab_jax.evaluation import retrieval, sheets
from vlab_jax.evaluation.registry import Plan
from vlab_jax.restore import Restored, restore
from vlab_jax.runtime import metrics, sharding
from vlab_jax.runtime.disk import write_json


def evaluate(config: ConfigDict, checkpoint: pathlib.Path, workdir: pathlib.Path | None) -> dict[str, dict[str, float]]:
    """Prints the table of a checkpoint on a split, and writes a report where there is a workdir.

    Args:
      config: fields of `config.evaluation_config`, checked.

    Raises:
      InputError: there is no such checkpoint, or the data cannot be read.
    """
    everywhere = sharding.make_mesh(**config.mesh)
    restored, mesh = restore(checkpoint, everywhere), sharding.own_mesh(everywhere)
    saved, name, encoder = restored.config, restored.stage, _encoder(config, restored, mesh)
    with jax.set_mesh(mesh), jax.default_matmul_precision(saved["matmul_precision"]):
        dataset = config.dataset or saved["data"]["evaluate"]
        options = BuildOptions.from_fields(dict(config.data))
        with sharding.primary_first("data"):
            source = registry.open_split(dataset, config.split, options, config.data.retry_seconds)
        row = (
            f"{name}, step {restored.step} ({dataset} {config.split}{_selected_on_test(saved, dataset, config.split)})"
        )
        trained = sources.parse_mixture(saved["stage"][name]["train"] or saved["data"]["train"])
        plan = Plan.of(
            dict(config),
            dict(config.generation),
            encoder.tokenizer,
            lambda: [registry.open_split(spec, "train", options, config.data.retry_seconds) for spec, _ in trained],
            config.data.max_failed_share,
        )
        written = workdir if sharding.is_primary() else None
        outcome = plan.evaluate(encoder, source, config.split, None if written is None else written / "texts")
        results = outcome.by_row(row)
        if not sharding.is_primary():
            return results
        if workdir is None:
            print(retrieval.format_table(results))
        else:
            sheets.write_report(
                workdir / "report",
                restored.home / metrics.METRICS_FILE,
                results,
                outcome,
                source,
                encoder.frames,
                queries=config.report.queries,
                title="Evaluation",
            )
            write_json(workdir / "results.json", results)
    return results


def _selected_on_test(saved: dict, dataset: str, split: str) -> str:
    """The mark of figures on the data that their checkpoint was selected by."""
    on = saved["checkpoint"].get("select_on")  # which configs of older runs lack
    return ", selected on test" if on == split == "test" and dataset == saved["data"]["evaluate"] else ""


def _encoder(config: ConfigDict, restored: Restored, mesh: jax.sharding.Mesh) -> evaluation.Encoder:
    """The model of a checkpoint, as it was trained to look at clips; on this process's own devices."""
    saved = restored.config
    limits = MediaLimits.from_fields(config.data.limits)
    frames = pipeline.FrameOptions(saved["frames"], saved["model"]["vision"]["image_size"], config.data.short, limits)
    workers = default_workers(config.data.workers)
    memory = PrefetchMemory(config.data.prefetch_gigabytes, free_shared_memory())
    plan = plan_prefetch(memory, batch=config.batch_size, frame_bytes=frames.nbytes, workers=workers)
    if plan.note:
        logging.warning("%s", plan.note)
    return evaluation.Encoder(
        restored.model,
        sharding.on_own_mesh(restored.parameters, mesh),
        tokenizers.load(restored.home, saved["model"]["text"]["context_length"]),
        frames,
        tuple(config.streams) or tuple(saved["stage"][restored.stage]["streams"]),
        sampling.sample_image_frames(saved["frames"], saved["image_frames"]),
        mesh,
        config.batch_size,
        workers,
        memory,
    )
