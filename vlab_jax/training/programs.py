"""The programs of a config, as shapes: the step of each stage, and the programs of embedding and captioning.

They are traced for a mesh whose devices need not exist here; nothing is computed, and no file is read.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlab_jax.data import sampling
from vlab_jax.models import generation, vlab
from vlab_jax.models.flops import Workload, forward_flops
from vlab_jax.models.generation import GenerationConfig
from vlab_jax.runtime import sharding
from vlab_jax.training import stage as stages
from vlab_jax.training.setup import make_model, read_stage

TEXTS_AT_ONCE = 64  # in one run of the program that embeds texts


@dataclasses.dataclass(frozen=True)
class Program:
    """One program for a mesh."""

    name: str
    batch: int  # clips (or texts) of one run on all devices
    unit: int  # the batch must be a multiple of it
    held: dict[str, int]  # bytes per device of its arguments: `parameters`, `optimiser`, `average`, `batch`
    flops: float | None  # model FLOPs of one run on all devices; None: not counted
    trace: Callable[[], Any]  # traces it, to be lowered


def stage_step(config: ConfigDict, name: str, mesh: Mesh, batch: int = 0) -> Program:
    """The training step of a stage; `batch` replaces its batch size."""
    model, stage = make_model(config, mesh), read_stage(config, name)
    if batch:
        stage = dataclasses.replace(stage, batch_size=batch)
    prepared = stages.prepare(model, stage, mesh)
    inputs = stages.batch_shapes(model, stage)
    shapes, shardings = prepared.shapes, prepared.shardings
    state = sharding.with_shardings(shapes, shardings)
    placed = sharding.with_shardings(inputs, dict.fromkeys(inputs, sharding.batch_sharding(mesh)))
    parts = {"parameters": state.parameters, "optimiser": state.optimizer, "average": state.average, "batch": placed}
    held = {name: _bytes(part) for name, part in parts.items()}
    unit = int(np.lcm(sharding.batch_divisor(mesh) * stage.micro_batches, stage.objective.contrastive_chunk or 1))
    flops = float(prepared.cost.flops)
    return Program(name, stage.batch_size, unit, held, flops, lambda: prepared.step.trace(shapes, inputs))


def inference_programs(config: ConfigDict, mesh: Mesh) -> list[Program]:
    """The programs of embedding and captioning, with the streams of the config's last stage.

    They run on batches of `evaluation.batch_size` clips and of `TEXTS_AT_ONCE` texts, rounded up for the mesh.
    """
    model, divisor = make_model(config, mesh), sharding.batch_divisor(mesh)
    streams = tuple(config.stage[config.stages[-1]].streams)
    image_frames = sampling.sample_image_frames(config.frames, config.image_frames)
    shapes = vlab.parameter_shapes(model, config.frames)
    parameters = sharding.with_shardings(shapes, sharding.shardings(shapes, mesh))
    clips, texts = (-(-count // divisor) * divisor for count in (config.evaluation.batch_size, TEXTS_AT_ONCE))
    side, length = model.vision["image_size"], model.text["context_length"]

    def batch_of(count: int, *shape: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=sharding.batch_sharding(mesh))

    video = batch_of(clips, config.frames, side, side, 3, dtype=np.uint8)
    tokens, lengths = batch_of(texts, length), batch_of(texts)
    fixed = (model, streams, image_frames)
    # There is no tokenizer here. Any end of text gives the same program.
    generation_config = GenerationConfig.from_fields(dict(config.generation), model.text["vocab_size"] - 1, length)

    def trace_captioning() -> Any:
        cache = jax.eval_shape(functools.partial(generation.cache_visual, *fixed), parameters, video)
        cache = sharding.with_shardings(cache, jax.tree.map(lambda leaf: _cache_sharding(leaf, clips, mesh), cache))
        prefixes = (batch_of(clips, 1), batch_of(clips))
        return generation.generate_texts.trace(model, generation_config, parameters["decoder"], cache, None, *prefixes)

    def program(name: str, batch: int, flops: float | None, trace: Callable, inputs: Any, used: Any) -> Program:
        held = {"parameters": _bytes(used), "optimiser": 0, "average": 0, "batch": _bytes(inputs)}
        return Program(name, batch, divisor, held, flops, trace)

    workload = functools.partial(Workload, frames=config.frames, image_frames=len(image_frames), decoded_texts=0)
    clip_flops = forward_flops(model, workload(clips=clips, streams=streams, embedded_texts=0))
    text_flops = forward_flops(model, workload(clips=0, streams=(), embedded_texts=texts))

    embed_clips = functools.partial(vlab.embed_clips.trace, *fixed, parameters, video)
    embed_texts = functools.partial(vlab.embed_texts.trace, model, parameters, tokens, lengths)
    encode_clips = functools.partial(generation.cache_visual.trace, *fixed, parameters, video)
    return [
        program("embed clips", clips, clip_flops, embed_clips, video, parameters),
        program("embed texts", texts, text_flops, embed_texts, (tokens, lengths), parameters),
        program("encode clips", clips, None, encode_clips, video, parameters),
        program("generate captions", clips, None, trace_captioning, (), parameters["decoder"]),
    ]


def _bytes(arrays: Any) -> int:
    """Bytes per device of shapes with shardings."""
    leaves = jax.tree.leaves(arrays)
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)


def _cache_sharding(leaf: Any, clips: int, mesh: Mesh) -> jax.sharding.NamedSharding:
    """The sharding of a leaf of a visual cache: by clips, the dimension after the blocks; parameters are replicated."""
    if len(leaf.shape) > 1 and leaf.shape[1] == clips:
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, sharding.BATCH_AXES))
    return sharding.replicated(mesh)
