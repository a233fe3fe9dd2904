"""Evaluates a checkpoint, by the config that it was saved with: what `--config=configs/evaluate.py` runs."""

import logging
import pathlib

import jax
from ml_collections import ConfigDict

from vlab_jax.data import builders, mixtures, pipeline, sampling
from vlab_jax.data import tokenizer as tokenizers
from vlab_jax.data.builders.options import BuildOptions
from vlab_jax.data.limits import MediaLimits
from vlab_jax.data.prefetch import PrefetchMemory, free_shared_memory, plan_prefetch
from vlab_jax.data.workers import default_workers
from vlab_jax.evaluation import retrieval, sheets
from vlab_jax.evaluation import run as evaluation
from vlab_jax.evaluation.tasks import Plan
from vlab_jax.restore import Restored, restore
from vlab_jax.runtime import meters, processes, sharding
from vlab_jax.runtime.json_file import write_json


def evaluate(config: ConfigDict, checkpoint: pathlib.Path, workdir: pathlib.Path | None) -> dict[str, dict[str, float]]:
    """Prints the table of a checkpoint on a split, and writes a report where there is a workdir.

    Args:
      config: fields of `config.evaluation_config`, checked.

    Raises:
      InputError: there is no such checkpoint, or the data cannot be read.
    """
    everywhere = sharding.make_mesh(**config.mesh)
    restored, mesh = restore(checkpoint, everywhere), processes.own_mesh(everywhere)
    saved, name, encoder = restored.config, restored.stage, _encoder(config, restored, mesh)
    with jax.set_mesh(mesh), jax.default_matmul_precision(saved["matmul_precision"]):
        dataset = config.dataset or saved["data"]["evaluate"]
        options = BuildOptions.from_fields(dict(config.data))
        with processes.primary_first("data"):
            source = builders.open_split(dataset, config.split, options, config.data.retry_seconds)
        row = (
            f"{name}, step {restored.step} ({dataset} {config.split}{_selected_on_test(saved, dataset, config.split)})"
        )
        trained = mixtures.parse_mixture(saved["stage"][name]["train"] or saved["data"]["train"])
        plan = Plan.of(
            dict(config),
            dict(config.generation),
            encoder.tokenizer,
            lambda: [builders.open_split(spec, "train", options, config.data.retry_seconds) for spec, _ in trained],
            config.data.max_failed_share,
        )
        written = workdir if processes.is_primary() else None
        outcome = plan.evaluate(encoder, source, config.split, None if written is None else written / "texts")
        results = outcome.by_row(row)
        if not processes.is_primary():
            return results
        if workdir is None:
            print(retrieval.format_table(results))
        else:
            sheets.write_report(
                workdir / "report",
                restored.home / meters.METRICS_FILE,
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
        processes.on_own_mesh(restored.parameters, mesh),
        tokenizers.load(restored.home, saved["model"]["text"]["context_length"]),
        frames,
        tuple(config.streams) or tuple(saved["stage"][restored.stage]["streams"]),
        sampling.sample_image_frames(saved["frames"], saved["image_frames"]),
        mesh,
        config.batch_size,
        workers,
        memory,
    )
