"""The train state, and one pure step of training."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from vlab_jax.models.vlab import VLAB
from vlab_jax.training import objectives

Metrics = dict[str, jax.Array]


class TrainState(struct.PyTreeNode):
    """What a step changes. `average` is the exponential moving average of the parameters, or None."""

    step: Any
    parameters: Any
    optimizer: Any
    average: Any = None

    @property
    def evaluated(self) -> Any:
        """The parameters that are evaluated: their average, if it is kept."""
        return self.parameters if self.average is None else self.average


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a stage minimises, and over which streams.

    Attributes:
      weights: of `contrastive`, `captioning`, `masked_lm` and `question_answering`; an objective that is absent or 0
        is not computed.
      streams: `video`, `image` or both.
      image_frames: the frames that the image stream takes.
      label_smoothing: of captioning and question answering.
      masked_share: of the tokens, for masked language modelling.
    """

    weights: Mapping[str, float]
    streams: tuple[str, ...]
    image_frames: tuple[int, ...]
    label_smoothing: float = 0.1
    masked_share: float = 0.15

    def __call__(self, model: VLAB, parameters: Any, batch: Mapping[str, jax.Array], rng: jax.Array):
        """The weighted loss, and the metrics: each objective's own loss among them."""

        def apply(method: str, *inputs: Any, **options: Any) -> Any:
            return model.apply({"params": parameters}, *inputs, **options, method=method)

        tokens, lengths = batch["tokens"], batch["lengths"]
        visual = apply("encode_visual", batch["video"], self.streams, self.image_frames)
        metrics = {}
        if self.weights.get("contrastive"):
            texts = apply("encode_text", tokens, lengths)
            loss, accuracy = objectives.contrastive(visual.embedding, texts, parameters["logit_scale"], batch["clip"])
            metrics |= {"contrastive_loss": loss, "batch_accuracy": accuracy}
        read = self._read_causally(batch)
        if read:
            beside = jnp.concatenate([texts for texts, _, _ in read.values()], axis=1)  # [B, R, L]
            logits = apply("decode", beside.reshape(-1, beside.shape[-1]), visual.streams, causal=True)
            logits = logits.reshape(*beside.shape, -1)  # [B, R, L, V]
        for name, (texts, starts, ends) in read.items():
            own, logits = jnp.split(logits, [texts.shape[1]], axis=1)
            flat = (part.reshape(-1, *part.shape[2:]) for part in (own, texts, starts, ends))
            metrics[f"{name}_loss"] = objectives.next_tokens(*flat, self.label_smoothing)
        if self.weights.get("masked_lm"):
            masked = objectives.choose_masked(rng, tokens, lengths, self.masked_share)
            logits = apply("decode", tokens, visual.streams, causal=False, lengths=lengths, masked=masked)
            metrics["masked_lm_loss"] = objectives.masked_lm(logits, tokens, masked)
        loss = sum(weight * metrics[f"{name}_loss"] for name, weight in self.weights.items() if weight)
        return loss, {"loss": loss, **metrics}

    def _read_causally(self, batch: Mapping[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
        """By objective, the texts that the decoder learns to go on with: tokens `[B, R, L]`, from where to where."""
        read = {}
        if self.weights.get("captioning"):
            tokens, lengths = batch["tokens"][:, None], batch["lengths"][:, None]
            read["captioning"] = (tokens, jnp.ones_like(lengths), lengths)
        if self.weights.get("question_answering"):
            read["question_answering"] = (batch["question_tokens"], batch["answer_starts"], batch["question_lengths"])
        return read


def init_state(parameters: Any, optimizer: optax.GradientTransformation, averaged: bool) -> TrainState:
    """A state at step 0 of a stage."""
    average = jax.tree.map(jnp.copy, parameters) if averaged else None
    return TrainState(jnp.zeros((), jnp.int32), parameters, optimizer.init(parameters), average)


def make_train_step(
    model: VLAB,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    learns: Any,
    *,
    seed: int,
    average_decay: float = 0.0,
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]:
    """The function (state, batch) → (state, metrics).

    Args:
      learns: a tree of bools like the parameters; the gradient of what does not learn is not computed.
      seed: of what the step draws (masked tokens); the draw depends on it and on the step alone.
      average_decay: of the moving average of the parameters; 0 keeps none.
    """

    def step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss(learned):
            merged = jax.tree.map(
                lambda new, old, learn: new if learn else jax.lax.stop_gradient(old),
                learned,
                state.parameters,
                learns,
                is_leaf=lambda leaf: leaf is None,
            )
            return objective(model, merged, batch, rng)

        learned = jax.tree.map(lambda leaf, learn: leaf if learn else None, state.parameters, learns)
        gradients, metrics = jax.grad(loss, has_aux=True)(learned)
        gradients = jax.tree.map(
            lambda gradient, leaf: jnp.zeros_like(leaf) if gradient is None else gradient,
            gradients,
            state.parameters,
            is_leaf=lambda leaf: leaf is None,
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        if learns["logit_scale"]:
            clamped = objectives.clamp_temperature(parameters["logit_scale"])
            parameters = {**parameters, "logit_scale": clamped}
        average = state.average
        if average is not None:
            average = optax.incremental_update(parameters, average, 1 - average_decay)
        metrics = {**metrics, "gradient_norm": optax.global_norm(gradients)}
        return TrainState(state.step + 1, parameters, optimizer_state, average), metrics

    return step
