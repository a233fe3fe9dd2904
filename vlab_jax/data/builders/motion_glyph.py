"""Glyphs of the `motion` data set: a small white mark in a corner of the frame, which stays as it is through the clip.

One frame shows all of it, and it has to be looked at closely: a detail for models of stills. Which clips' words tell of
it, a `MotionConfig` says.
"""

import dataclasses

import numpy as np
from jaxtyping import Float32, UInt8

from vlab_jax.data.builders.motion_text import a
from vlab_jax.data.schema import Question

KINDS = ("plus", "cross", "dash", "pillar", "dot", "box")
_WHITE = 250
# In shares of the frame's side.
_RADIUS, _CENTRE, _SHIFT = 4 / 48, 6 / 48, 1 / 48


@dataclasses.dataclass(frozen=True)
class Glyph:
    """A glyph as words name it, one of `KINDS`, and its centre `(x, y)` in shares of the frame's side."""

    kind: str
    centre: tuple[float, float]


def draw_glyph(rng: np.random.Generator) -> Glyph:
    """A glyph of a random kind near a random corner."""
    kind = KINDS[rng.integers(len(KINDS))]
    near = _CENTRE + rng.uniform(-_SHIFT, _SHIFT, 2)
    x, y = np.where(rng.integers(2, size=2), near, 1 - near)
    return Glyph(kind, (float(x), float(y)))


def stamp(frames: UInt8[np.ndarray, "t h w 3"], glyph: Glyph) -> UInt8[np.ndarray, "t h w 3"]:
    """The frames with the glyph on top, antialiased."""
    side = frames.shape[1]
    place = (np.arange(side, dtype=np.float32) + 0.5) / side
    across, down = np.meshgrid(*((place - np.float32(centre)) / np.float32(_RADIUS) for centre in glyph.centre))
    distance = _distance(glyph.kind, across, down)
    cover = np.clip(0.5 - distance * (_RADIUS * side), 0, 1)[..., None]
    return (frames * (1 - cover) + cover * _WHITE + 0.5).astype(np.uint8)


def _distance(kind: str, u: Float32[np.ndarray, "h w"], v: Float32[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
    """The signed distance to the glyph's outline in radii, below 0 inside."""
    dash, pillar = (np.maximum(np.abs(p) - 1, np.abs(q) - 0.28) for p, q in ((u, v), (v, u)))
    if kind == "cross":
        return _distance("plus", (u + v) / np.sqrt(np.float32(2)), (v - u) / np.sqrt(np.float32(2)))
    if kind == "plus":
        return np.minimum(dash, pillar)
    if kind == "box":
        return np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.75) - 0.25
    return {"dash": dash, "pillar": pillar, "dot": np.hypot(u, v) - 0.6}[kind]


def telling(caption: str, kind: str) -> str:
    """The caption with the glyph told."""
    return f"{caption}, with {a(kind)} in the corner"


def tell(glyph: Glyph, captions: tuple[str, ...], every: int = 1) -> tuple[str, ...]:
    """The captions, with the glyph told in the last of `every` few."""
    return tuple(
        telling(caption, glyph.kind) if number % every == 0 else caption for number, caption in enumerate(captions, 1)
    )


def glyph_question(glyph: Glyph) -> Question:
    """A question of type `glyph`, which a close look at one frame answers."""
    return Question("which mark is in the corner?", glyph.kind, "glyph")


def detail_question(caption: str, glyph: Glyph, rng: np.random.Generator) -> Question:
    """A question of type `detail`: the caption told with every kind of glyph, in random order; one is true."""
    options = tuple(telling(caption, KINDS[kind]) for kind in rng.permutation(len(KINDS)))
    return Question("which caption is true?", telling(caption, glyph.kind), "detail", options)
