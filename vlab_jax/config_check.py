"""The checks that turn a mistake in a config into one line."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vlab_jax.config import adapted_blocks, evaluation_config, stage_config, training_config, type_name, unknown_keys
from vlab_jax.errors import InputError
from vlab_jax.models.decoder import BLENDINGS
from vlab_jax.models.layers import ACTIVATIONS, REMAT_POLICIES
from vlab_jax.models.video_adapter import MIXERS
from vlab_jax.models.vlab import FRAME_POOLINGS

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

TASKS = ("retrieval", "captioning", "question_answering")
# What the figures of each task are called.
FIGURES = {
    "retrieval": r"(text_to_video|video_to_text)/(R@1|R@5|R@10|median_rank|mean_rank)|.+_accuracy",
    "captioning": r"BLEU-[1-4]|METEOR|ROUGE-L|CIDEr",
    "question_answering": r"QA .+",
}
QUERY_NORMALISATIONS = ("dual_softmax", "querybank")

# Least and greatest values; None: any. Fields of a stage stand under `stage`, whatever its name, here and in `CHOICES`.
RANGES: dict[str, tuple[float, float | None]] = {
    "seed": (0, None),
    "model.embedding_blend": (0.0, 1.0),
    "model.text.context_length": (3, None),
    "model.vision.rotary_grid": (0, None),
    "data.workers": (-1, None),
    "data.prefetch_gigabytes": (0.001, None),
    "data.max_failed_share": (0.0, 1.0),
    "data.retry_seconds": (0.0, None),
    "data.frame_rate": (0.01, 1000.0),
    "data.short_side": (16, None),
    "data.jpeg_quality": (1, 100),
    "data.limits.max_pixels": (1, None),
    "data.limits.max_frames": (1, None),
    "data.limits.max_seconds": (0.001, None),
    "data.limits.max_bytes": (1, None),
    "data.limits.decode_seconds": (0.001, None),
    "most_skipped": (0, None),
    "stage.steps": (1, None),
    "stage.batch_size": (1, None),
    "stage.micro_batches": (1, None),
    "stage.contrastive_chunk": (0, None),
    "stage.frames": (0, None),
    "stage.warmup_steps": (0, None),
    "stage.end_learning_rate_share": (0.0, 1.0),
    "stage.weight_decay": (0.0, None),
    "stage.clip_norm": (0.0, None),
    "stage.average_decay": (0.0, 1.0),
    "stage.objectives.contrastive": (0.0, None),
    "stage.objectives.captioning": (0.0, None),
    "stage.objectives.masked_lm": (0.0, None),
    "stage.objectives.question_answering": (0.0, None),
    "stage.questions_per_clip": (1, None),
    "stage.label_smoothing": (0.0, 1.0),
    "stage.masked_share": (0.0, 1.0),
    "stage.evaluate_every": (0, None),
    # Of the config of an evaluation, and of `evaluation` in that of a run.
    "batch_size": (1, None),
    "closed_list": (0, None),
    "rerank": (0, None),
    "dual_softmax_temperature": (1e-4, None),
    "querybank_size": (1, None),
    "querybank_beta": (1e-4, None),
    "generation.beams": (1, None),
    "generation.length_penalty": (0.0, None),
    "generation.max_tokens": (0, None),
    "checkpoint.every": (1, None),
    "checkpoint.keep": (1, None),
    "log_every": (1, None),
    "stop_after": (0, None),
    "report.queries": (1, None),
}


def check(config: ConfigDict) -> None:
    """Compares a config with the fields of `config.training_config` or `config.evaluation_config`.

    Raises:
      InputError: the first field that is unknown (with the nearest known one), of a wrong type, not one of its
        choices, out of its range, or in contradiction to another.
    """
    task = config.get("task")
    if task not in ("train", "evaluate"):
        raise InputError(f"config.task is {task!r}; it must be 'train' or 'evaluate'")
    known = training_config() if task == "train" else evaluation_config()
    if task == "train":
        known.stage = {name: stage_config() for name in config.get("stage", {})}
    _check_tree(config.to_dict(), known.to_dict(), "")
    if task == "train":
        _check_scored(config.evaluation, "evaluation.")
        _check_sense(config)
    else:
        _check_scored(config, "")


def _check_tree(given: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> None:
    unknown_keys(given, known, f"config.{prefix}".rstrip("."))
    for key, default in known.items():
        name = f"{prefix}{key}"
        if key not in given:
            raise InputError(f"config.{name} is missing; its default is {default!r}")
        value = given[key]
        if isinstance(default, Mapping):
            if not isinstance(value, Mapping):
                raise InputError(f"config.{name} is {value!r}; it must be a group of fields")
            _check_tree(value, default, f"{name}.")
        elif not _same_type(value, default):
            raise InputError(f"config.{name} is {value!r}; it must be of type {type_name(default)}, like {default!r}")
        choices = CHOICES.get(_general(name))
        if choices and value not in choices:
            raise InputError(f"config.{name} is {value!r}; it must be one of {', '.join(choices)}")
        _check_range(name, value)


def _general(name: str) -> str:
    """A field's name as it stands in `CHOICES` and `RANGES`."""
    return re.sub(r"^evaluation\.", "", re.sub(r"^stage\.[^.]+", "stage", name))


def _check_range(name: str, value: Any) -> None:
    """Whole numbers of the model count something."""
    counts = name.startswith("model.") and type(value) is int
    low, high = RANGES.get(_general(name), (1 if counts else None, None))
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"config.{name} is {value!r}; it must be {bounds}")


def _same_type(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, tuple | list):
        return isinstance(value, tuple | list) and all(_same_entry(each, default) for each in value)
    return isinstance(value, type(default))


def _same_entry(value: Any, default: Sequence[Any]) -> bool:
    """Whether a value can stand in a tuple: as the default's first entry does, or, in an empty one, as a name."""
    first = default[0] if default else ""
    return isinstance(value, tuple | list) if isinstance(first, tuple | list) else _same_type(value, first)


def _check_sense(config: ConfigDict) -> None:
    for name in config.stages:
        if name not in config.stage:
            known = ", ".join(config.stage) or "none"
            raise InputError(f"config.stages names {name!r}, but config.stage has no such stage (it has: {known})")
        _check_stage(name, config.stage[name], config.model.decoder.blending)
    if not config.stages or len(set(config.stages)) < len(config.stages):
        raise InputError(f"config.stages is {tuple(config.stages)}; name at least one stage of config.stage, each once")
    if not 1 <= config.image_frames <= config.frames:
        raise InputError(
            f"config.image_frames is {config.image_frames}; it must be from 1 to config.frames={config.frames}"
        )
    for tower in ("vision", "text"):
        fields = config.model[tower]
        if fields.width % fields.heads:
            raise InputError(f"config.model.{tower}.width={fields.width} does not divide by heads={fields.heads}")
    vision = config.model.vision
    if vision.image_size % vision.patch_size:
        raise InputError(
            f"config.model.vision.image_size={vision.image_size} does not divide by patch_size={vision.patch_size}"
        )
    if vision.embed_width != config.model.text.embed_width:
        raise InputError(
            f"config.model.vision.embed_width={vision.embed_width} and config.model.text.embed_width="
            f"{config.model.text.embed_width} must be equal"
        )
    adapter = config.model.adapter
    if adapter.mixer == "attention" and adapter.width % adapter.heads:
        raise InputError(f"config.model.adapter.width={adapter.width} does not divide by heads={adapter.heads}")
    if len(adapter.kernel) != 3 or any(size < 1 or size % 2 == 0 for size in adapter.kernel):
        raise InputError(f"config.model.adapter.kernel is {adapter.kernel}; it must be three odd numbers (t, h, w)")
    every, depth = config.model.decoder.cross_attention_every, config.model.text.depth
    if not 1 <= every <= depth:
        raise InputError(f"config.model.decoder.cross_attention_every is {every}; it must be from 1 to {depth}")
    adapted_blocks(adapter.blocks, vision.depth)
    _check_selection(config.checkpoint, config.stage[config.stages[-1]].evaluate or config.evaluation.tasks)


def _check_scored(fields: ConfigDict, prefix: str) -> None:
    check_tasks(f"{prefix}tasks", fields.tasks)
    if not set(fields.query_normalisation) <= set(QUERY_NORMALISATIONS):
        raise InputError(
            f"config.{prefix}query_normalisation is {tuple(fields.query_normalisation)}; it may name "
            f"{' and '.join(QUERY_NORMALISATIONS)}"
        )


def check_tasks(name: str, tasks: Sequence[str]) -> None:
    """Raises InputError where a field of tasks names none, or one that there is not."""
    if not tasks or not set(tasks) <= set(TASKS):
        raise InputError(f"config.{name} is {tuple(tasks)}; it must name one or more of {', '.join(TASKS)}")


def _check_selection(fields: ConfigDict, tasks: Sequence[str]) -> None:
    if fields.select_by and not any(re.fullmatch(FIGURES[task], fields.select_by) for task in tasks):
        raise InputError(
            f"config.checkpoint.select_by is {fields.select_by!r}; it must be a figure of {' or '.join(tasks)}, as "
            "'text_to_video/R@1', 'CIDEr' or 'QA all'"
        )
    if (fields.select_on == "test") != fields.i_select_on_test_data:
        raise InputError(
            f"config.checkpoint.select_on is {fields.select_on!r} and i_select_on_test_data "
            f"{fields.i_select_on_test_data}; a checkpoint chosen by the test data looks better than it is: select on "
            "'validation', or say both select_on='test' and i_select_on_test_data=True, and every table will say so too"
        )


def _check_stage(name: str, stage: ConfigDict, blending: str) -> None:
    if not stage.streams or not set(stage.streams) <= {"video", "image"}:
        raise InputError(
            f"config.stage.{name}.streams is {tuple(stage.streams)}; it must name 'video', 'image' or both"
        )
    if stage.evaluate:
        check_tasks(f"stage.{name}.evaluate", stage.evaluate)
    if not any(stage.objectives.values()):
        raise InputError(f"config.stage.{name}.objectives are all 0; give at least one of them a weight")
    needed = {"none": {"video"}, "image_only": {"image"}}.get(blending, {"video", "image"})
    decodes = any(weight for name, weight in stage.objectives.items() if name != "contrastive")
    if decodes and not needed & set(stage.streams):
        raise InputError(
            f"config.stage.{name}.streams is {tuple(stage.streams)}, of which the decoder sees none with "
            f"config.model.decoder.blending={blending!r}; add a stream, or leave contrastive alone"
        )
