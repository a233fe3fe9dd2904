"""Is attention on this device correct? Outputs and gradients for many shapes, compared with NumPy's.

    python -m experiments.speed.attention --cases=60 --seconds=90

First the attentions of L/14's training steps, then random ones: 1 to 300 tokens, heads of every published width, causal
or not, rows of any length from 0. NumPy computes the same in float64, with explicit gradients. In float32 a difference
of 1e-5 is an error, in bfloat16 a difference above the rounding of the type (`allowed`).
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed import program
from experiments.timing import made_with
from vlab_jax.models.attention import Kernels, attend
from vlab_jax.runtime import sharding

HEAD_WIDTHS = (24, 64, 72, 80, 88, 96, 104, 128)
ROWS = 3
NAMES = ("output", "gradient of the query", "gradient of the key", "gradient of the value")


class Case(NamedTuple):
    """Attention of `queries` to `keys` tokens in `ROWS` rows; `lengths` are the keys of each row (None: all)."""

    queries: int
    keys: int
    heads: int
    head_width: int
    causal: bool
    lengths: tuple[int, ...] | None
    dtype: str


def cases(seed: int) -> Iterator[Case]:
    """First the cases of L/14 (8 frames, 4 of them in the image stream), then random ones, without end."""
    for dtype in ("bfloat16", "float32"):
        yield Case(257, 257, 16, 64, False, None, dtype)
        yield Case(77, 77, 12, 64, True, None, dtype)
        yield Case(77, 77, 12, 64, False, (77, 30, 0), dtype)
        yield Case(77, 4 * 257, 12, 64, False, None, dtype)
        yield Case(77, 8 * 257, 12, 64, False, None, dtype)
    rng = np.random.default_rng(seed)
    while True:
        queries, keys = (int(length) for length in rng.integers(1, 301, 2))
        causal = bool(rng.integers(2))
        if causal:
            keys = queries  # the same sequence
        lengths = None if rng.integers(2) else (0, *(int(length) for length in rng.integers(1, keys + 1, ROWS - 1)))
        width = int(rng.choice(HEAD_WIDTHS))
        yield Case(queries, keys, 2, width, causal, lengths, "float32" if rng.integers(4) == 0 else "bfloat16")


def on_this_device(
    query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool, kv_lengths: jax.Array | None
) -> jax.Array:
    """This package's attention, as this device computes it."""
    platform = sharding.platform_of(program.one_device())
    return attend(query, key, value, causal=causal, kv_lengths=kv_lengths, kernels=Kernels(platform))


def by_numpy(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, cotangent: np.ndarray, visible: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Softmax attention in float64 and its gradients; `visible`: `[B, L, K]`, true where a query sees a key."""
    query, key, value, cotangent = (x.astype(np.float64).swapaxes(1, 2) for x in (query, key, value, cotangent))
    scale, visible = query.shape[-1] ** -0.5, visible[:, None]
    scores = np.where(visible, scale * query @ key.swapaxes(2, 3), -np.inf)
    highest = np.where(visible.any(-1, keepdims=True), scores.max(-1, keepdims=True), 0)
    weights = np.exp(scores - highest)
    weights /= np.maximum(weights.sum(-1, keepdims=True), np.finfo(np.float64).tiny)  # a row without keys: zeros
    to_weights = cotangent @ value.swapaxes(2, 3)
    to_scores = weights * (to_weights - (to_weights * weights).sum(-1, keepdims=True))
    gradients = scale * to_scores @ key, scale * to_scores.swapaxes(2, 3) @ query, weights.swapaxes(2, 3) @ cotangent
    return tuple(x.swapaxes(1, 2) for x in (weights @ value, *gradients))


def allowed(name: str, exact: dict[str, np.ndarray], dtype: str) -> float:
    """The allowed error of an array: of its largest value in float32, of its root mean square in half precision.

    Two roundings of bfloat16, relative to the array; the gradients of queries and keys are differences that contain the
    rounded output, so that one rounding of the output is added (with one key they are zero).
    """
    if dtype == "float32":
        return 1e-5 * max(1.0, np.abs(exact[name]).max())
    share = rms(exact["output"]) if name in NAMES[1:3] else 0.0
    return float(jnp.finfo(dtype).eps) * (2 * rms(exact[name]) + share)


def rms(x: np.ndarray) -> float:
    """The root mean square."""
    return float(np.sqrt((x**2).mean()))


def off(case: Case, attention: Callable[..., jax.Array] = on_this_device) -> dict[str, float]:
    """The errors of output and gradients, in units of the allowed error: above 1 is wrong."""
    rng = np.random.default_rng(case.queries + 1000 * case.keys)
    shapes = [(ROWS, length, case.heads, case.head_width) for length in (case.queries, *[case.keys] * 2, case.queries)]
    *given, cotangent = (jnp.asarray(rng.standard_normal(shape), case.dtype) for shape in shapes)
    lengths = None if case.lengths is None else jnp.asarray(case.lengths, jnp.int32)

    def with_gradients(given: list[jax.Array], cotangent: jax.Array, lengths: jax.Array | None) -> tuple[Any, ...]:
        function = functools.partial(attention, causal=case.causal, kv_lengths=lengths)
        output, pull = jax.vjp(function, *given)
        return output, *pull(cotangent)

    with jax.default_matmul_precision("highest"):  # otherwise accelerators round float32 products
        found = jax.jit(with_gradients)(given, cotangent, lengths)
    visible = np.arange(case.keys) < np.asarray(case.lengths or [case.keys] * ROWS)[:, None, None]
    visible = np.broadcast_to(visible, (ROWS, case.queries, case.keys))
    if case.causal:
        visible = visible & np.tri(case.queries, dtype=bool)
    arrays = by_numpy(*(np.asarray(x, np.float64) for x in (*given, cotangent)), visible)
    exact = dict(zip(NAMES, arrays, strict=True))
    measure = rms if case.dtype != "float32" else (lambda x: float(np.abs(x).max()))
    shares = {}
    for name, one in zip(NAMES, found, strict=True):
        difference = measure(np.asarray(one, np.float64) - exact[name])
        shares[name] = difference / allowed(name, exact, case.dtype) if difference != 0 else 0.0
    return shares


def checked(count: int, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Checks `count` cases, or fewer if the time is over; returns the wrong ones, and the worst of the others."""
    began, done, wrong, worst = time.monotonic(), 0, [], {"bfloat16": 0.0, "float32": 0.0}
    for case in cases(seed):
        if done == count or time.monotonic() - began > seconds:
            break
        try:
            shares = off(case)
        except Exception as error:  # a kernel's refusal is a result, whatever exception it raises
            wrong.append(f"{case}: {str(error).strip().splitlines()[0]}")
        else:
            wrong += [f"{case}: {name} is off {share:.1f} times" for name, share in shares.items() if not share <= 1]
            worst[case.dtype] = max(worst[case.dtype], *shares.values())
        done += 1
    return {"cases": done, "wrong": wrong, "worst share of what is allowed": worst, **made_with()}


def main() -> None:
    """Prints the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=90.0, help="start no further case after this time")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(json.dumps(checked(given.cases, given.seconds, given.seed)))


if __name__ == "__main__":
    main()
