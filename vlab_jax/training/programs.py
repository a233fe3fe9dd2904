"""The programs of a config, as shapes: each stage's step, and what embedding and captioning run.

Nothing is computed and no file is read: they are lowered for a mesh, whose devices need not be there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlab_jax.config import model_fields, plain
from vlab_jax.data import sampling
from vlab_jax.models import generation
from vlab_jax.models.flops import Work, forward_flops
from vlab_jax.models.generation import Search
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.runtime import sharding
from vlab_jax.training import stage as stages

TEXTS = 64  # that are embedded at once


@dataclasses.dataclass(frozen=True)
class Program:
    """One program for a mesh.

    Attributes:
      name: of the stage, or what it does.
      batch: clips (or texts) of one run of it, on all devices together.
      unit: what that must be a multiple of.
      held: bytes a device of what it is given, by what that is: `parameters`, `optimiser`, `average`, `batch`.
      flops: model FLOPs of one run, on all devices together; None: they are not counted.
      trace: returns it traced, to be lowered.
    """

    name: str
    batch: int
    unit: int
    held: dict[str, int]
    flops: float | None
    trace: Callable[[], Any]


def stage_step(config: ConfigDict, name: str, mesh: Mesh, batch: int = 0) -> Program:
    """The training step of a stage of a config; with `batch`, of so many clips.

    Raises:
      InputError: the parameter groups or the batch do not fit.
    """
    if batch:
        config = config.copy_and_resolve_references()
        config.stage[name].batch_size = batch
    stage, model = config.stage[name], model_of(config, mesh)
    made = stages.prepare(model, stage, config, mesh)
    given = stages.batch_shapes(model, stage, config)
    held = {
        "parameters": bytes_a_device(made.shapes.parameters, made.shardings.parameters),
        "optimiser": bytes_a_device(made.shapes.optimizer, made.shardings.optimizer),
        "average": bytes_a_device(made.shapes.average, made.shardings.average),
        "batch": bytes_a_device(given, jax.tree.map(lambda _: sharding.batch_sharding(mesh), given)),
    }
    unit = int(np.lcm(sharding.batch_divisor(mesh) * stage.micro_batches, stage.contrastive_chunk or 1))
    return Program(
        name, stage.batch_size, unit, held, float(made.cost.flops), lambda: made.step.trace(made.shapes, given)
    )


def uses(config: ConfigDict, mesh: Mesh) -> list[Program]:
    """What embedding and captioning run, as the config's last stage is evaluated: batches of `evaluation.batch_size`
    clips, rounded up to what the mesh divides, and of 64 texts.

    Raises:
      InputError: a text would be longer than the model has positions for.
    """
    model, divisor = model_of(config, mesh), sharding.batch_divisor(mesh)
    streams = tuple(config.stage[config.stages[-1]].streams)
    image_frames = sampling.sample_image_frames(config.frames, config.image_frames)
    shapes = parameter_shapes(model, config.frames)
    parameters = _placed(shapes, sharding.shardings(shapes, mesh))
    clips, texts = (-(-count // divisor) * divisor for count in (config.evaluation.batch_size, TEXTS))
    side, length = model.vision["image_size"], model.text["context_length"]

    def rows(count: int, *shape: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=sharding.batch_sharding(mesh))

    video = rows(clips, config.frames, side, side, 3, dtype=np.uint8)
    held = {"parameters": _bytes(parameters), "optimiser": 0, "average": 0}
    seen = Work(clips, config.frames, len(image_frames), streams, contrasted=0, read=0)
    read = Work(0, config.frames, len(image_frames), (), contrasted=texts, read=0)
    looks = (model, streams, image_frames, parameters, video)
    tokens, lengths = rows(texts, length), rows(texts)
    # The ids of a tokenizer that is not there: the end of text is its last but for the padding, which changes nothing.
    search = Search.of(dict(config.generation), model.text["vocab_size"] - 1, length)

    def write() -> Any:
        memory = jax.eval_shape(functools.partial(generation.remember, *looks[:3]), *looks[3:])
        memory = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_beside(leaf, clips, mesh)), memory
        )
        given = (rows(clips, 1), rows(clips))
        return generation.write.trace(model, search, parameters["decoder"], memory, None, *given)

    return [
        Program(
            "embed clips",
            clips,
            divisor,
            held | {"batch": _bytes(video)},
            forward_flops(model, seen),
            lambda: generation.embed_clips.trace(*looks),
        ),
        Program(
            "embed texts",
            texts,
            divisor,
            held | {"batch": _bytes((tokens, lengths))},
            forward_flops(model, read),
            lambda: generation.embed_texts.trace(model, parameters, tokens, lengths),
        ),
        Program(
            "see clips",
            clips,
            divisor,
            held | {"batch": _bytes(video)},
            None,
            lambda: generation.remember.trace(*looks),
        ),
        Program(
            "write captions",
            clips,
            divisor,
            held | {"parameters": _bytes(parameters["decoder"]), "batch": 0},
            None,
            write,
        ),
    ]


def model_of(config: ConfigDict, mesh: Mesh) -> VLAB:
    """The model of a config, as it is used on the devices of a mesh."""
    return VLAB.from_fields(model_fields(plain(config.to_dict()), sharding.platform_of(mesh)))


def bytes_a_device(shapes: Any, shardings: Any) -> int:
    """Of arrays, by their shapes and shardings."""
    return _bytes(_placed(shapes, shardings))


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
    )


def _bytes(arrays: Any) -> int:
    leaves = jax.tree.leaves(arrays)
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)


def _beside(leaf: Any, clips: int, mesh: Mesh) -> Any:
    """Where what is remembered of clips lies: split along the clips, which come second, behind the blocks."""
    if len(leaf.shape) > 1 and leaf.shape[1] == clips:
        spec = jax.sharding.PartitionSpec(None, sharding.BATCH_AXES)
        return jax.sharding.NamedSharding(mesh, spec)
    return sharding.replicated(mesh)
