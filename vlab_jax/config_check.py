"""Checks the fields of a config; each mistake is one line. Choices are the names in the registries, which need JAX."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vlab_jax.config import adapted_blocks, check_keys, evaluation_config, stage_config, training_config
from vlab_jax.errors import InputError
from vlab_jax.evaluation.registry import TASKS, is_figure
from vlab_jax.evaluation.retrieval_metrics import METHODS
from vlab_jax.models.decoder import BLENDINGS
from vlab_jax.models.layers import ACTIVATIONS, REMAT_POLICIES
from vlab_jax.models.video_adapter import MIXERS
from vlab_jax.models.vlab import FRAME_POOLINGS, STREAMS

CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": ("float32", "bfloat16"),
    "attention": ("auto", "xla"),
    "matmul_precision": ("default", "high", "highest"),
    "model.image_encoder": ("shared", "separate"),
    "model.frame_pooling": tuple(FRAME_POOLINGS),
    "model.remat": ("none", *REMAT_POLICIES),
    "model.adapter.mixer": tuple(MIXERS),
    "model.adapter.activation": (*ACTIVATIONS, "none"),
    "model.decoder.blending": tuple(BLENDINGS),
    "model.vision.activation": tuple(ACTIVATIONS),
    "model.text.activation": tuple(ACTIVATIONS),
    "stage.unused": ("decay", "frozen"),
    "checkpoint.select_on": ("validation", "last", "test"),
    "tokenizer.kind": ("auto", "bpe", "clip"),
    "data.short": ("repeat", "fail"),
    "data.variant": ("file", "frames"),
}

# Smallest and largest values (None: any). Here and in `CHOICES`, `stage` stands for every stage, and fields below
# `evaluation` stand without it, as in the config of an evaluation.
RANGES: dict[tuple[float, float | None], str] = {
    (0, None): (
        "seed model.vision.rotary_grid most_skipped stage.contrastive_chunk stage.frames stage.warmup_steps "
        "stage.evaluate_every closed_list rerank generation.max_tokens stop_after data.retry_seconds "
        "stage.weight_decay stage.clip_norm stage.objectives.contrastive stage.objectives.captioning "
        "stage.objectives.masked_lm stage.objectives.question_answering generation.length_penalty"
    ),
    (1, None): (
        "data.limits.max_pixels data.limits.max_frames data.limits.max_bytes stage.steps stage.batch_size "
        "stage.micro_batches stage.questions_per_clip batch_size querybank_size generation.beams checkpoint.every "
        "checkpoint.keep log_every report.queries"
    ),
    (0.0, 1.0): (
        "model.embedding_blend data.max_failed_share stage.end_learning_rate_share stage.average_decay "
        "stage.label_smoothing stage.masked_share"
    ),
    (0.001, None): "data.prefetch_gigabytes data.limits.max_seconds data.limits.decode_seconds",
    (1e-4, None): "dual_softmax_temperature querybank_beta",
    (-1, None): "data.workers",
    (3, None): "model.text.context_length",
    (16, None): "data.short_side",
    (1, 100): "data.jpeg_quality",
    (0.01, 1000.0): "data.frame_rate",
}
_BOUNDS = {name: bounds for bounds, names in RANGES.items() for name in names.split()}


def check(config: ConfigDict) -> None:
    """Compares a config with the fields of `config.training_config` or `config.evaluation_config`. Raises `InputError`
    for the first field that is unknown (with the nearest known one), of a wrong type, not one of its choices, out of
    its range, or contradicts another."""
    for mistake in _mistakes(config):
        raise InputError(mistake)


def _mistakes(config: ConfigDict) -> Iterator[str]:
    task = config.get("task")
    if task == "train":
        known = training_config()
        known.stage = {name: stage_config() for name in config.get("stage", {})}
        yield from _mistakes_of_fields(config.to_dict(), known.to_dict(), "")
        yield from _mistakes_of_evaluation(config.evaluation, "evaluation.")
        yield from _mistakes_of_model(config)
        yield from _mistakes_of_stages(config)
        yield from _mistakes_of_selection(config)
    elif task == "evaluate":
        yield from _mistakes_of_fields(config.to_dict(), evaluation_config().to_dict(), "")
        yield from _mistakes_of_evaluation(config, "")
    else:
        yield f"config.task is {task!r}; it must be 'train' or 'evaluate'"


def _mistakes_of_fields(fields: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> Iterator[str]:
    check_keys(fields, known, f"config.{prefix}".rstrip("."))
    for key, default in known.items():
        name = f"{prefix}{key}"
        if key not in fields:
            yield f"config.{name} is missing; its default is {default!r}"
        value = fields[key]
        wrong = f"config.{name} is {value!r}; it must be"
        if isinstance(default, Mapping):
            if not isinstance(value, Mapping):
                yield f"{wrong} a group of fields"
            yield from _mistakes_of_fields(value, default, f"{name}.")
            continue
        if not _same_type(value, default):
            kind = "tuple" if isinstance(default, list) else type(default).__name__
            yield f"{wrong} of type {kind}, like {default!r}"
        general = re.sub(r"^evaluation\.", "", re.sub(r"^stage\.[^.]+", "stage", name))
        if general in CHOICES and value not in CHOICES[general]:
            yield f"{wrong} one of {', '.join(CHOICES[general])}"
        # Whole numbers of the model are sizes and counts.
        least = 1 if name.startswith("model.") and type(value) is int else None
        low, high = _BOUNDS.get(general, (least, None))
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            yield f"{wrong} at least {low}" if high is None else f"{wrong} from {low} to {high}"


def _same_type(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, tuple | list):
        first = default[0] if default else ""  # an entry is like the default's first, or a name
        if isinstance(first, tuple | list):
            return isinstance(value, tuple | list) and all(isinstance(each, tuple | list) for each in value)
        return isinstance(value, tuple | list) and all(_same_type(each, first) for each in value)
    return isinstance(value, type(default))


def _mistakes_of_evaluation(fields: ConfigDict, prefix: str) -> Iterator[str]:
    yield from _mistakes_of_tasks(f"{prefix}tasks", fields.tasks)
    methods = tuple(fields.query_normalisation)
    if not set(methods) <= set(METHODS):
        yield f"config.{prefix}query_normalisation is {methods}; it may name {' and '.join(METHODS)}"


def _mistakes_of_tasks(name: str, tasks: Sequence[str]) -> Iterator[str]:
    if not tasks or not set(tasks) <= set(TASKS):
        yield f"config.{name} is {tuple(tasks)}; it must name one or more of {', '.join(TASKS)}"


def _mistakes_of_model(config: ConfigDict) -> Iterator[str]:
    vision, text, adapter = config.model.vision, config.model.text, config.model.adapter
    frames, image_frames, every = config.frames, config.image_frames, config.model.decoder.cross_attention_every
    if not 1 <= image_frames <= frames:
        yield f"config.image_frames is {image_frames}; it must be from 1 to config.frames={frames}"
    quotients = [("vision", "width", "heads"), ("text", "width", "heads"), ("vision", "image_size", "patch_size")]
    if adapter.mixer == "attention":
        quotients.append(("adapter", "width", "heads"))
    for part, field, divisor in quotients:
        size, count = config.model[part][field], config.model[part][divisor]
        if size % count:
            yield f"config.model.{part}.{field}={size} does not divide by {divisor}={count}"
    if vision.embed_width != text.embed_width:
        widths = f"{vision.embed_width} and config.model.text.embed_width={text.embed_width}"
        yield f"config.model.vision.embed_width={widths} must be equal"
    if len(adapter.kernel) != 3 or any(size < 1 or size % 2 == 0 for size in adapter.kernel):
        yield f"config.model.adapter.kernel is {adapter.kernel}; it must be three odd numbers (t, h, w)"
    if not 1 <= every <= text.depth:
        yield f"config.model.decoder.cross_attention_every is {every}; it must be from 1 to {text.depth}"
    adapted_blocks(adapter.blocks, vision.depth)


def _mistakes_of_stages(config: ConfigDict) -> Iterator[str]:
    blending = config.model.decoder.blending
    needed = {"none": {"video"}, "image_only": {"image"}}.get(blending, set(STREAMS))
    for name in config.stages:
        if name not in config.stage:
            known = ", ".join(config.stage) or "none"
            yield f"config.stages names {name!r}, but config.stage has no such stage (it has: {known})"
        stage = config.stage[name]
        streams = f"config.stage.{name}.streams is {tuple(stage.streams)}"
        if not stage.streams or not set(stage.streams) <= set(STREAMS):
            yield f"{streams}; it must name 'video', 'image' or both"
        if stage.evaluate:
            yield from _mistakes_of_tasks(f"stage.{name}.evaluate", stage.evaluate)
        if not any(stage.objectives.values()):
            yield f"config.stage.{name}.objectives are all 0; give at least one of them a weight"
        decodes = any(weight for objective, weight in stage.objectives.items() if objective != "contrastive")
        if decodes and not needed & set(stage.streams):
            yield (
                f"{streams}, of which the decoder uses none with config.model.decoder.blending={blending!r}; add a "
                "stream, or keep only the contrastive objective"
            )
    if not config.stages or len(set(config.stages)) < len(config.stages):
        yield f"config.stages is {tuple(config.stages)}; name at least one stage of config.stage, each once"


def _mistakes_of_selection(config: ConfigDict) -> Iterator[str]:
    fields, tasks = config.checkpoint, config.stage[config.stages[-1]].evaluate or config.evaluation.tasks
    if fields.select_by and not is_figure(fields.select_by, tasks):
        figures = f"{' or '.join(tasks)}, as {' or '.join(repr(TASKS[task].default_figure) for task in tasks)}"
        yield f"config.checkpoint.select_by is {fields.select_by!r}; it must be a figure of {figures}"
    if (fields.select_on == "test") != fields.i_select_on_test_data:
        yield (
            f"config.checkpoint.select_on is {fields.select_on!r} and i_select_on_test_data "
            f"{fields.i_select_on_test_data}; a checkpoint selected on test data looks better than it is: select on "
            "'validation', or set both select_on='test' and i_select_on_test_data=True, and every table will say so"
        )
