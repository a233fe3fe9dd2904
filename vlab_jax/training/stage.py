"""A stage made ready: its parameter groups and optimiser, the shapes and placement of its state, its compiled step."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vlab_jax.errors import InputError
from vlab_jax.models.attention_check import AttentionShape, attention_shapes
from vlab_jax.models.flops import Workload, step_flops
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.runtime import sharding
from vlab_jax.runtime.profiling import StepCost, peak_flops
from vlab_jax.training import frozen, optim
from vlab_jax.training.objectives import Objective
from vlab_jax.training.step import TrainState, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class StageSettings:
    """What a config says of a stage (`config.stage_config`), as plain values that can be hashed."""

    name: str
    objective: Objective
    groups: tuple[optim.Group, ...]
    freeze_unused: bool  # whether parameters that no objective reaches are frozen
    mixture: tuple[tuple[str, float], ...]  # the data sets that it is trained on, with their weights
    tasks: tuple[str, ...]  # evaluated after it
    frames: int  # of a clip
    questions: int  # of a clip in one step; 0 without question answering
    seed: int  # of the run
    steps: int
    batch_size: int
    micro_batches: int
    warmup_steps: int
    end_learning_rate_share: float
    weight_decay: float
    clip_norm: float
    b1: float
    b2: float
    average_decay: float
    start_from_clip: bool
    evaluate_every: int

    @property
    def causal_texts(self) -> int:
        """Texts of a clip that the decoder reads from left to right in a step."""
        return bool(self.objective.weights["captioning"]) + self.questions

    @property
    def has_masked_lm(self) -> bool:
        """Whether the decoder also reads a text of each clip in both directions."""
        return bool(self.objective.weights["masked_lm"])


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage needs to run."""

    groups: tuple[optim.Group, ...]
    cost: StepCost
    schedule: Any  # (step) → the factor of the learning rates
    shapes: TrainState  # on the devices
    shardings: TrainState
    saved_shapes: TrainState  # with all parameters in float32
    saved_shardings: TrainState
    # (parameters) → float32 values, on the host, of those that the devices hold in the compute type (`frozen.py`)
    originals: Callable[[Any], Any]
    initial: Callable[[Any], TrainState]  # (parameters) → state at step 0; the parameters are used up
    resumed: Callable[[TrainState], TrainState]  # (saved state) → state; the saved state is used up
    step: Any  # (state, batch) → (state, metrics); the state that is passed in is used up


def check_stages(model: VLAB, stages: Sequence[StageSettings], mesh: Mesh) -> None:
    """Checks all stages of a run, so that a later one does not fail after hours of the first; raises `InputError` if
    the parameter groups of a stage do not fit the model, or its batch does not fit the mesh."""
    shapes = parameter_shapes(model, model.frames)
    divisor = sharding.batch_divisor(mesh)
    for stage in stages:
        field, size, chunk = f"config.stage.{stage.name}", stage.batch_size, stage.objective.contrastive_chunk
        try:
            optim.assign_groups(shapes, all_groups(model, stage))
        except InputError as error:
            raise InputError(f"{field}.groups: {error}") from error
        part = f"into micro_batches={stage.micro_batches} on each of {divisor} devices"
        if size % divisor:
            part = f"over the {divisor} devices that share the batch"
        if size % (divisor * stage.micro_batches):
            raise InputError(f"{field}.batch_size={size} does not divide {part}")
        if chunk and size % chunk:
            raise InputError(f"{field}.contrastive_chunk={chunk} does not divide batch_size={size}")


def all_groups(model: VLAB, stage: StageSettings) -> tuple[optim.Group, ...]:
    """The parameter groups of a stage; the first freezes what no objective reaches, if the stage says so."""
    if not stage.freeze_unused:
        return stage.groups
    shapes, objective = parameter_shapes(model, model.frames), stage.objective
    return frozen.freeze_unused(shapes, stage.groups, model, objective.weights, objective.streams)


@functools.lru_cache(maxsize=8)
def prepare(model: VLAB, stage: StageSettings, mesh: Mesh) -> Stage:
    """Makes a stage ready, for any parameters of the model's shape.

    The last ones are cached together with what was compiled for them: a run that is started again in the same process,
    as in a notebook, does not compile again.
    """
    shapes = parameter_shapes(model, model.frames)
    groups = all_groups(model, stage)
    trainable_mask = optim.trainable_mask(shapes, groups)
    rounded = frozen.rounded_mask(shapes, trainable_mask, model.dtype)
    schedule = optim.warmup_cosine(stage.steps, stage.warmup_steps, stage.end_learning_rate_share)
    labels, decay, clip_norm = optim.assign_groups(shapes, groups), stage.weight_decay, stage.clip_norm
    optimizer = optim.make_optimizer(
        groups, labels, schedule, weight_decay=decay, clip_norm=clip_norm, b1=stage.b1, b2=stage.b2
    )

    def init(parameters):
        return init_state(parameters, optimizer, bool(stage.average_decay), trainable_mask)

    saved = jax.eval_shape(init, shapes)
    placed = sharding.shardings(saved, mesh)
    state = saved.replace(parameters=frozen.rounded_shapes(shapes, rounded, model.dtype))
    init = jax.jit(init, out_shardings=placed, donate_argnums=0)

    def round_frozen(parameters):
        return frozen.round_frozen(parameters, rounded, placed.parameters, model.dtype)

    step = make_train_step(
        model,
        stage.objective,
        optimizer,
        trainable_mask,
        seed=stage.seed,
        average_decay=stage.average_decay,
        micro_batches=stage.micro_batches,
    )

    def on_mesh(state, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # whatever mesh is set where the step is called
            return step(state, batch)

    return Stage(
        groups,
        _cost(model, stage, trainable_mask, mesh),
        schedule,
        state,
        placed,
        saved,
        placed.replace(parameters=frozen.host_shardings(placed.parameters, rounded)),
        originals=lambda parameters: frozen.keep_originals(parameters, rounded, placed.parameters),
        initial=lambda parameters: init(round_frozen(parameters)),
        resumed=lambda saved: saved.replace(parameters=round_frozen(saved.parameters)),
        step=jax.jit(
            on_mesh,
            in_shardings=(placed, sharding.batch_sharding(mesh)),
            out_shardings=(placed, sharding.replicated(mesh)),
            donate_argnums=0,
        ),
    )


def _cost(model: VLAB, stage: StageSettings, trainable_mask: Any, mesh: Mesh) -> StepCost:
    clips, objective = stage.batch_size, stage.objective
    work = Workload(
        clips,
        stage.frames,
        len(objective.image_frames),
        objective.streams,
        embedded_texts=clips if objective.is_contrastive else 0,
        decoded_texts=clips * (stage.causal_texts + stage.has_masked_lm),
        decoder_passes=bool(stage.causal_texts) + stage.has_masked_lm,
    )
    parts = {name: any(jax.tree.leaves(part)) for name, part in trainable_mask.items()}
    return StepCost(clips, clips * stage.frames, step_flops(model, work, parts), peak_flops(list(mesh.devices.flat)))


def stage_attention_shapes(model: VLAB, stages: Sequence[StageSettings]) -> list[AttentionShape]:
    """The attentions that the stages compute, each once."""
    shapes = []
    for stage in stages:
        images, streams = len(stage.objective.image_frames), stage.objective.streams
        shapes += attention_shapes(model, stage.frames, images, streams, stage.causal_texts, stage.has_masked_lm)
    return list(dict.fromkeys(shapes))


def batch_shapes(model: VLAB, stage: StageSettings) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch as the step takes them and `data.pipeline` makes them."""
    clips, length, side = stage.batch_size, model.text["context_length"], model.vision["image_size"]
    shapes = {
        "video": ((clips, stage.frames, side, side, 3), np.uint8),
        "tokens": ((clips, length), np.int32),
        "lengths": ((clips,), np.int32),
        "clip": ((clips,), np.int32),
    }
    if stage.questions:
        questions = (clips, stage.questions)
        shapes["question_tokens"] = ((*questions, length), np.int32)
        shapes |= dict.fromkeys(("question_lengths", "answer_starts"), (questions, np.int32))
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
