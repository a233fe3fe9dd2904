"""A stage made ready: its parameter groups and optimiser, the shapes and placement of its state, its compiled step."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from vlab_jax.data import sampling
from vlab_jax.errors import InputError
from vlab_jax.models.attention_check import AttentionShape, attention_shapes
from vlab_jax.models.flops import Work, step_flops
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.runtime import sharding
from vlab_jax.runtime.metrics import StepCost
from vlab_jax.runtime.profiling import peak_flops
from vlab_jax.training import frozen, optim
from vlab_jax.training.frozen import freeze_unused
from vlab_jax.training.objectives import Objective
from vlab_jax.training.step import TrainState, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage needs to run.

    Attributes:
      groups: its parameter groups.
      cost: what a step goes through.
      schedule: the factor of their learning rates at a step.
      shapes, shardings: of its `TrainState` on the devices.
      rounded: which parameters are held in the compute type there (`frozen_storage.py`).
      saved_shapes, saved_shardings: of its `TrainState` as it is saved, with the float32 values of these.
      dtype: the compute type.
      init: (parameters) → state at step 0.
      step: (state, batch) → (state, metrics); the state that is passed in is used up.
    """

    groups: tuple[optim.Group, ...]
    cost: StepCost
    schedule: Any
    shapes: TrainState
    shardings: TrainState
    rounded: Any
    saved_shapes: TrainState
    saved_shardings: TrainState
    dtype: Any
    init: Any
    step: Any

    def originals(self, parameters: Any) -> Any:
        """The float32 values, on the host, of the parameters that are held rounded; None for the others."""
        return frozen.originals(parameters, self.rounded, self.shardings.parameters)

    def initial(self, parameters: Any) -> TrainState:
        """The state at step 0; the arrays of `parameters` are used up."""
        return self.init(self._held(parameters))

    def resumed(self, saved: TrainState) -> TrainState:
        """The state of what was saved; the arrays of `saved` are used up."""
        return saved.replace(parameters=self._held(saved.parameters))

    def _held(self, parameters: Any) -> Any:
        return frozen.held(parameters, self.rounded, self.shardings.parameters, self.dtype)


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
            optim.assign_groups(shapes, groups_of(model, stage, shapes))
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


def groups_of(model: VLAB, stage: ConfigDict, shapes: Any) -> tuple[optim.Group, ...]:
    """The parameter groups of a stage, before them a frozen one of what it does not use, where the stage says so.

    Args:
      stage: fields of `config.stage_config`.
      shapes: of the model's parameters.

    Raises:
      InputError: one of its groups is no (pattern, learning rate or 'frozen').
    """
    groups = optim.parse_groups(stage.groups)
    if stage.unused == "decay":
        return groups
    return freeze_unused(shapes, groups, model, dict(stage.objectives), tuple(stage.streams))


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
    groups = groups_of(model, stage, shapes)
    trainable = optim.trainable(shapes, groups)
    rounded = frozen.rounded(shapes, trainable, model.dtype)
    schedule = optim.warmup_cosine(stage.steps, stage.warmup_steps, stage.end_learning_rate_share)
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
        return init_state(parameters, optimizer, bool(stage.average_decay), trainable)

    saved = jax.eval_shape(initial, shapes)
    saved_at = sharding.shardings(saved, mesh)
    state = saved.replace(parameters=frozen.held_shapes(shapes, rounded, model.dtype))
    placed = sharding.shardings(state, mesh)
    step = make_train_step(
        model,
        objective_of(stage, config),
        optimizer,
        trainable,
        seed=config.seed,
        average_decay=stage.average_decay,
        parts=stage.micro_batches,
    )

    def on_mesh(state, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # whatever mesh is set where the step is called
            return step(state, batch)

    return Stage(
        groups,
        _cost(model, stage, config, trainable, mesh),
        schedule,
        state,
        placed,
        rounded,
        saved,
        saved_at.replace(parameters=frozen.on_host(saved_at.parameters, rounded)),
        model.dtype,
        jax.jit(initial, out_shardings=placed, donate_argnums=0),
        jax.jit(
            on_mesh,
            in_shardings=(placed, sharding.batch_sharding(mesh)),
            out_shardings=(placed, sharding.replicated(mesh)),
            donate_argnums=0,
        ),
    )


def _cost(model: VLAB, stage: ConfigDict, config: ConfigDict, learns: Any, mesh: Mesh) -> StepCost:
    weights, frames, clips = stage.objectives, stage.frames or config.frames, stage.batch_size
    causal = causal_texts(stage)
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


def causal_texts(stage: ConfigDict) -> int:
    """Texts of a clip that the decoder reads from left to right in a stage's step."""
    weights = stage.objectives
    return bool(weights.captioning) + stage.questions_per_clip * bool(weights.question_answering)


def attention_shapes_of(model: VLAB, config: ConfigDict) -> list[AttentionShape]:
    """The attentions that the stages of a config compute, each once."""
    shapes = []
    for name in config.stages:
        stage = config.stage[name]
        frames, weights = stage.frames or config.frames, stage.objectives
        image_frames = min(frames, config.image_frames)
        shapes += attention_shapes(
            model, frames, image_frames, stage.streams, causal_texts(stage), bool(weights.masked_lm)
        )
    return list(dict.fromkeys(shapes))


def batch_shapes(model: VLAB, stage: ConfigDict, config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """What a stage's step is given of its clips, as `data.pipeline` makes it."""
    clips, length, side = stage.batch_size, model.text["context_length"], model.vision["image_size"]
    shapes = {
        "video": ((clips, stage.frames or config.frames, side, side, 3), np.uint8),
        "tokens": ((clips, length), np.int32),
        "lengths": ((clips,), np.int32),
        "clip": ((clips,), np.int32),
    }
    if stage.objectives.question_answering:
        asked = (clips, stage.questions_per_clip)
        shapes["question_tokens"] = ((*asked, length), np.int32)
        shapes |= dict.fromkeys(("question_lengths", "answer_starts"), (asked, np.int32))
    return {name: jax.ShapeDtypeStruct(*each) for name, each in shapes.items()}


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
