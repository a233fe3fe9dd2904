"""Captions and questions of `motion/still`: what one frame shows, and nothing of motion."""

import numpy as np
from jaxtyping import Float

from vlab_jax.data.builders.motion_scene import Scene, X, Y
from vlab_jax.data.builders.motion_text import a, appearance_questions, noun
from vlab_jax.data.schema import Question

_ONE_SHAPE = (
    "{a}",
    "a photo of {a}",
    "there is {a}",
    "one shape: {a}",
    "{a} on {ground} background",
    "{a} {place}",
    "a picture of {a} {place}",
)
_TWO_SHAPES = (
    "{a} and {b}",
    "a photo of {a} and {b}",
    "there is {a} and there is {b}",
    "two shapes: {a} and {b}",
    "{a} and {b} on {ground} background",
    "{a} {relation} {b}",
    "{a} {place} and {b}",
)


def still_captions(scene: Scene, frame: int, rng: np.random.Generator, count: int = 4) -> tuple[str, ...]:
    """`count` captions (at most 5) of how things look in one frame, from different templates."""
    order = rng.permutation(len(scene.shapes))
    names = [a(noun(scene.shapes[i])) for i in order]
    centres = scene.states([frame])[order, 0][:, [X, Y]]
    words = {
        "a": names[0],
        "b": names[-1],
        "ground": a(scene.background),
        "place": place(centres[0]),
        "relation": relation(centres[0], centres[-1]),
    }
    templates = _ONE_SHAPE if len(names) == 1 else _TWO_SHAPES
    true = [t for t in templates if all(word is not None or f"{{{name}}}" not in t for name, word in words.items())]
    return tuple(true[i].format(**words) for i in rng.permutation(len(true))[:count])


def place(centre: Float[np.ndarray, "2"]) -> str | None:
    """Where in the frame, if words for it are beyond doubt."""
    x, y = centre - 0.5
    if max(abs(x), abs(y)) < 0.08:
        return "in the middle"
    side = ("on the left" if x < 0 else "on the right") if abs(x) > 0.14 else None
    height = ("at the top" if y < 0 else "at the bottom") if abs(y) > 0.14 else None
    if side and height:
        return f"{height} {side.split()[-1]}"
    if abs(x) > 0.08 and abs(y) > 0.08:
        return None
    return side or height


def relation(one: Float[np.ndarray, "2"], other: Float[np.ndarray, "2"]) -> str | None:
    """Where one thing is as seen from another, if one word for it is beyond doubt."""
    x, y = one - other
    if abs(x) > 2 * abs(y):
        return "to the left of" if x < 0 else "to the right of"
    if abs(y) > 2 * abs(x):
        return "above" if y < 0 else "below"
    return None


def still_questions(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    """Two questions of type appearance: on the count or the background, and on a colour or a kind."""
    count, *details = appearance_questions(scene.shapes)
    ground = Question("what is the background like?", scene.background, "appearance")
    return (count, ground)[rng.integers(2)], details[rng.integers(len(details))]
