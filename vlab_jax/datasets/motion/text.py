"""Captions and questions of the `motion` data set: what is true of a scene, in several wordings.

Wordings are drawn with a Generator from choices that do not depend on the direction of time. So a scene and
its reversal, worded with equal Generators, get the same templates and synonyms: twin captions differ in
nothing but what happens, and no word tells which of two twins is meant.
"""

import itertools
import re

import numpy as np
from jaxtyping import Int

from vlab_jax.data.schema import Question
from vlab_jax.datasets.motion.scene import FAMILIES, FAMILY, Event, Scene, Shape

# Per motion: synonyms, each as (present, perfect). A motion and its inverse have matching rows.
PHRASES = {
    "left": (
        ("moves left", "moved left"),
        ("slides to the left", "slid to the left"),
    ),
    "right": (
        ("moves right", "moved right"),
        ("slides to the right", "slid to the right"),
    ),
    "up": (
        ("moves up", "moved up"),
        ("slides upwards", "slid upwards"),
    ),
    "down": (
        ("moves down", "moved down"),
        ("slides downwards", "slid downwards"),
    ),
    "grow": (("grows", "grown"), ("gets bigger", "become bigger")),
    "shrink": (("shrinks", "shrunk"), ("gets smaller", "become smaller")),
    "clockwise": (
        ("turns clockwise", "turned clockwise"),
        ("rotates clockwise", "rotated clockwise"),
    ),
    "anticlockwise": (
        ("turns anticlockwise", "turned anticlockwise"),
        ("rotates anticlockwise", "rotated anticlockwise"),
    ),
    "appear": (
        ("appears", "appeared"),
        ("becomes visible", "become visible"),
    ),
    "vanish": (
        ("vanishes", "vanished"),
        ("becomes invisible", "become invisible"),
    ),
}
SYNONYMS = 2

# [n] is the clause of the n-th event, [n+] its perfect, [n-] its verb alone; {a} is the one actor, {rest} the
# other shape.
_ONE_EVENT = (
    "{a} [1-]",
    "[1]",
    "there is {a} that [1-]",
    "a video of {a} that [1-]",
    "in this clip, [1]",
    "{a} is seen, and it [1-]",
)
_ONE_EVENT_AND_REST = (
    "[1] while {rest} stays still",
    "{rest} stays still and [1]",
    "[1] and {rest} does nothing",
    "while {rest} rests, [1]",
)
_MORE_EVENTS = {
    2: (
        "[1], then [2]",
        "first [1], then [2]",
        "[1]; after that, [2]",
        "[2] after [1+]",
        "[1] before [2]",
    ),
    3: (
        "[1], then [2], then [3]",
        "first [1], then [2], and finally [3]",
        "[1]; after that, [2], and then [3]",
        "before [3], [1] and then [2]",
        "after [1+], [2], and then [3]",
        "[3] after [1+] and then [2+]",
    ),
}


def noun(shape: Shape) -> str:
    """The shape as a noun without article: 'red circle'."""
    return f"{shape.colour} {shape.kind}"


def a(words: str) -> str:
    """The words with their indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def captions(scene: Scene, rng: np.random.Generator, count: int = 4) -> tuple[str, ...]:
    """`count` captions (at most 5) that each tell the scene's whole story, from different templates."""
    synonyms = rng.integers(SYNONYMS, size=(count, len(scene.shapes), len(FAMILIES)))
    templates = _templates(scene)
    chosen = rng.permutation(len(templates))[:count]
    return tuple(_fill(templates[t], scene, s) for t, s in zip(chosen, synonyms, strict=True))


def _templates(scene: Scene) -> tuple[str, ...]:
    if len(scene.events) > 1:
        return _MORE_EVENTS[len(scene.events)]
    return _ONE_EVENT + (_ONE_EVENT_AND_REST if len(scene.shapes) > 1 else ())


def _fill(template: str, scene: Scene, synonyms: Int[np.ndarray, "shapes families"]) -> str:
    """The template with its clauses; a shape that the clause before was about is 'it'."""
    mentioned: list[int] = []

    def clause(match: re.Match[str]) -> str:
        event = scene.events[int(match[1]) - 1]
        present, perfect = _phrase(event, synonyms)
        again = mentioned[-1:] == [event.shape]
        mentioned.append(event.shape)
        subject = "it" if again else f"the {noun(scene.shapes[event.shape])}"
        return {"": f"{subject} {present}", "+": f"{subject} has {perfect}", "-": present}[match[2]]

    actor = scene.events[0].shape
    rest = "".join(f"the {noun(shape)}" for i, shape in enumerate(scene.shapes) if i != actor)
    return re.sub(r"\[(\d)([+-]?)\]", clause, template).format(a=a(noun(scene.shapes[actor])), rest=rest)


def _phrase(event: Event, synonyms: Int[np.ndarray, "shapes families"]) -> tuple[str, str]:
    """The (present, perfect) that `synonyms` [shape, family] chooses for this event."""
    family = list(FAMILIES).index(FAMILY[event.motion])
    return PHRASES[event.motion][synonyms[event.shape, family]]


def questions(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    """One question of each type that the scene has an answer to: appearance, motion, order."""
    kinds = _by_type(scene, rng)
    # Drawn for every type, so that a scene and its reversal are asked the same.
    picks = rng.random(len(kinds))
    return tuple(some[int(pick * len(some))] for some, pick in zip(kinds, picks, strict=True) if some)


def all_questions(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    """Every question that the scene has an answer to, to learn from."""
    return tuple(itertools.chain(*_by_type(scene, rng)))


def _by_type(scene: Scene, rng: np.random.Generator) -> tuple[list[Question], ...]:
    return appearance_questions(scene.shapes), motion_questions(scene, rng), order_questions(scene, rng)


def appearance_questions(shapes: tuple[Shape, ...]) -> list[Question]:
    """Questions that one frame answers: a colour, a shape, the count."""
    asked = [Question("how many shapes are there?", str(len(shapes)), "appearance")]
    for shape in shapes:
        asked.append(Question(f"what colour is the {shape.kind}?", shape.colour, "appearance"))
        asked.append(Question(f"what shape is {shape.colour}?", shape.kind, "appearance"))
    return asked


def motion_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions on what one shape does; given the question, all its answers are equally likely."""
    asked = []
    for index, shape in enumerate(scene.shapes):
        swap = bool(rng.integers(2))
        motions = [event.motion for event in scene.events if event.shape == index]
        if len(motions) == 1:
            asked.append((f"what does the {noun(shape)} do?", PHRASES[motions[0]][0][0]))
        moves = [motion for motion in motions if FAMILY[motion] in ("horizontal", "vertical")]
        if len(moves) == 1:
            asked.append((f"which way does the {noun(shape)} move?", moves[0]))
        for family in ("size", "turn", "presence"):
            for motion in set(motions) & set(FAMILIES[family]):
                one, other = FAMILIES[family][:: -1 if swap else 1]
                verb = "turn " if family == "turn" else ""
                asked.append((f"does the {noun(shape)} {verb}{one} or {other}?", motion))
    return [Question(question, answer, "motion") for question, answer in asked]


def order_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions on which of two things comes first; the question names both, in an order drawn with `rng`.

    Where a shape does more than to appear or vanish, grammar would give the order away: then nothing is
    asked.
    """
    swap = rng.integers(2, size=2)
    for index in range(len(scene.shapes)):
        families = [FAMILY[event.motion] for event in scene.events if event.shape == index]
        if "presence" in families and len(families) > 1:
            return []
    if len(scene.events) < 2:
        return []
    asked = []
    first, second = sorted(range(len(scene.events)), key=lambda e: _timeless(scene.events[e]))[:2]
    clauses = [_clause(scene, event) for event in (first, second)]
    listed = clauses[:: -1 if swap[0] else 1]
    asked.append((f"what happens first: {listed[0]} or {listed[1]}?", clauses[int(second < first)]))
    actors = sorted({event.shape for event in scene.events})
    if len(actors) == 2 and len(scene.events) == 2:
        names = [f"the {noun(scene.shapes[i])}" for i in actors]
        listed = names[:: -1 if swap[1] else 1]
        answer = f"the {noun(scene.shapes[scene.events[0].shape])}"
        asked.append((f"which shape acts first, {listed[0]} or {listed[1]}?", answer))
    return [Question(question, answer, "order") for question, answer in asked]


def _timeless(event: Event) -> tuple[int, int]:
    """Sorts events in the same way whichever way time runs."""
    return event.shape, list(FAMILIES).index(FAMILY[event.motion])


def _clause(scene: Scene, event: int) -> str:
    shape, motion = scene.shapes[scene.events[event].shape], scene.events[event].motion
    return f"the {noun(shape)} {PHRASES[motion][0][0]}"


def twin_questions(own: str, twin: str, rng: np.random.Generator) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """One question for a clip and one for its twin: the same two options, in the same random order."""
    options = (own, twin)[:: -1 if rng.integers(2) else 1]
    return tuple((Question("which caption is true?", answer, "twin", options),) for answer in (own, twin))
