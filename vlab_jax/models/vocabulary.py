"""Logits over the vocabulary, and what is computed of them, a few places of the texts at a time.

The logits of all places, `[N, L, V]` in float32, are the largest array that a text decoder could make: 7.3 GiB for
512 texts of CLIP's length and vocabulary. Here they are made for as many places as `CHUNK_BYTES` holds, and, where
gradients are taken, made again in the backward pass.

Dimensions: `N` texts, `L` places, `W` width, `V` vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlab_jax.models.partition import gathered

CHUNK_BYTES = 2**28  # of float32 logits that exist at once on a device


def logits_of(states: Float[Array, "*N W"], table: Float[Array, "V W"]) -> Float[Array, "*N V"]:
    """Logits in float32, of states in the type that products are computed in."""
    table = gathered(table.astype(states.dtype), tensor_axis=0)
    return jnp.einsum("...w,vw->...v", states, table, preferred_element_type=jnp.float32)


def token_losses(
    states: Float[Array, "N L W"],
    table: Float[Array, "V W"],
    targets: Int[Array, "N L"],
    counted: Bool[Array, "N L"],
    smoothing: float = 0.0,
    devices: int = 1,
) -> Float[Array, "N L"]:
    """Cross-entropy of each place's target, in float32; 0 where it is not `counted`.

    Places at which no text has a target that counts are passed over.

    Args:
      states: what logits are made of, by `logits_of`.
      smoothing: the share of probability that label smoothing spreads over the vocabulary.
      devices: that share the texts.
    """
    texts, length = targets.shape
    chunk = max(1, CHUNK_BYTES // (4 * -(-texts // devices) * table.shape[0]))
    if chunk >= length:
        return _losses(smoothing, table, states, targets, counted)
    chunk = -(-length // -(-length // chunk))  # as few as before, of about the same size
    missing = -length % chunk

    def parts(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(texts, -1, chunk, *x.shape[2:]), 1, 0)

    # Once for all parts; in float32, so that the gradients of the parts are added up in it.
    whole = gathered(table.astype(states.dtype), tensor_axis=0).astype(jnp.float32)
    compute = jax.checkpoint(functools.partial(_losses, smoothing))

    def part(_: None, given: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        nothing = jnp.zeros(given[1].shape, jnp.float32)
        return None, jax.lax.cond(given[2].any(), compute, lambda *_: nothing, whole, *given)

    _, losses = jax.lax.scan(part, None, (parts(states), parts(targets), parts(counted)))
    return jnp.moveaxis(losses, 0, 1).reshape(texts, -1)[:, :length]


def _losses(
    smoothing: float,
    table: Float[Array, "V W"],
    states: Float[Array, "N L W"],
    targets: Int[Array, "N L"],
    counted: Bool[Array, "N L"],
) -> Float[Array, "N L"]:
    logits = logits_of(states, table)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    loss = normaliser - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * (normaliser - logits.mean(axis=-1))
    return jnp.where(counted, loss, 0.0)
