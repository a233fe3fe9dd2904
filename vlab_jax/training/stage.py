"""A stage made ready: its parameter groups and optimiser, the shapes and placement of its state, its compiled step."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from vlab_jax.data import sampling
from vlab_jax.errors import InputError
from vlab_jax.models.flops import Work, step_flops
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.runtime import sharding
from vlab_jax.runtime.chips import peak_flops
from vlab_jax.training import optim
from vlab_jax.training.stage_objective import Objective
from vlab_jax.training.step import TrainState, init_state, make_train_step
from vlab_jax.training.step_cost import StepCost


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage needs to run.

    Attributes:
      groups: its parameter groups.
      cost: what a step goes through.
      schedule: the factor of their learning rates at a step.
      shapes, shardings: of its `TrainState`.
      initial: (parameters) → state at step 0.
      step: (state, batch) → (state, metrics); the state that is passed in is used up.
    """

    groups: tuple[optim.Group, ...]
    cost: StepCost
    schedule: Any
    shapes: TrainState
    shardings: TrainState
    initial: Any
    step: Any


def check(model: VLAB, config: ConfigDict, mesh: Mesh) -> None:
    """Looks at all stages of a config, so that a later one does not fail after hours of the first.

    Raises:
      InputError: the parameter groups of a stage do not fit the model, or its batch does not fit the mesh.
    """
    shapes = parameter_shapes(model, config.frames)
    divisor = sharding.batch_divisor(mesh)
    for name in config.stages:
        stage = config.stage[name]
        try:
            optim.assign_groups(shapes, optim.parse_groups(stage.groups))
        except InputError as error:
            raise InputError(f"config.stage.{name}.groups: {error}") from error
        if stage.batch_size % divisor:
            raise InputError(
                f"config.stage.{name}.batch_size={stage.batch_size} does not divide over the {divisor} devices that "
                "share the batch"
            )
        if stage.batch_size % (divisor * stage.micro_batches):
            raise InputError(
                f"config.stage.{name}.batch_size={stage.batch_size} does not divide into micro_batches="
                f"{stage.micro_batches} on each of {divisor} devices"
            )
        if stage.contrastive_chunk and stage.batch_size % stage.contrastive_chunk:
            raise InputError(
                f"config.stage.{name}.contrastive_chunk={stage.contrastive_chunk} does not divide batch_size="
                f"{stage.batch_size}"
            )


def prepare(model: VLAB, stage: ConfigDict, config: ConfigDict, mesh: Mesh) -> Stage:
    """Makes the stage of a config ready, for any parameters of the model's shape.

    The last ones are kept, with what is compiled of them: a run that is started again in the same process, as in a
    notebook, trains at once.

    Args:
      stage: fields of `config.stage_config`.
      config: fields of `config.training_config`.

    Raises:
      InputError: the parameter groups do not fit the model.
    """
    looked_at = {name: config[name] for name in ("frames", "image_frames", "seed")}
    return _prepare(model, FrozenConfigDict(stage), FrozenConfigDict(looked_at), mesh)


@functools.lru_cache(maxsize=8)
def _prepare(model: VLAB, stage: FrozenConfigDict, config: FrozenConfigDict, mesh: Mesh) -> Stage:
    """`prepare`, from the fields that it looks at alone."""
    shapes = parameter_shapes(model, config.frames)
    groups = optim.parse_groups(stage.groups)
    learns = optim.trainable(shapes, groups)
    schedule = optim.course(stage.steps, stage.warmup_steps, stage.end_learning_rate_share)
    optimizer = optim.make_optimizer(
        groups,
        optim.assign_groups(shapes, groups),
        schedule,
        weight_decay=stage.weight_decay,
        clip_norm=stage.clip_norm,
        b1=stage.b1,
        b2=stage.b2,
    )

    def initial(parameters):
        return init_state(parameters, optimizer, bool(stage.average_decay))

    state = jax.eval_shape(initial, shapes)
    placed = sharding.shardings(state, mesh)
    step = make_train_step(
        model,
        objective_of(stage, config),
        optimizer,
        learns,
        seed=config.seed,
        average_decay=stage.average_decay,
        parts=stage.micro_batches,
    )

    def on_mesh(state, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # whatever mesh is set where the step is called
            return step(state, batch)

    return Stage(
        groups,
        _cost(model, stage, config, learns, mesh),
        schedule,
        state,
        placed,
        jax.jit(initial, out_shardings=placed),
        jax.jit(
            on_mesh,
            in_shardings=(placed, sharding.batch_sharding(mesh)),
            out_shardings=(placed, sharding.replicated(mesh)),
            donate_argnums=0,
        ),
    )


def _cost(model: VLAB, stage: ConfigDict, config: ConfigDict, learns: Any, mesh: Mesh) -> StepCost:
    weights, frames, clips = stage.objectives, stage.frames or config.frames, stage.batch_size
    causal = bool(weights.captioning) + stage.questions_per_clip * bool(weights.question_answering)
    work = Work(
        clips,
        frames,
        min(frames, config.image_frames),
        tuple(stage.streams),
        contrasted=clips if weights.contrastive else 0,
        read=clips * (causal + bool(weights.masked_lm)),
        passes=bool(causal) + bool(weights.masked_lm),
    )
    parts = {name: any(jax.tree.leaves(part)) for name, part in learns.items()}
    return StepCost(clips, clips * frames, step_flops(model, work, parts), peak_flops(list(mesh.devices.flat)))


def objective_of(stage: ConfigDict, config: ConfigDict) -> Objective:
    """What a stage of a config minimises."""
    frames = stage.frames or config.frames
    return Objective(
        dict(stage.objectives),
        tuple(stage.streams),
        sampling.sample_image_frames(frames, min(frames, config.image_frames)),
        stage.label_smoothing,
        stage.masked_share,
        stage.contrastive_chunk,
    )
