"""Captions and questions of the `motion` data set: what is true of a scene, or of one frame of it, in several wordings.

Wordings are drawn with a Generator from choices that do not depend on the direction of time. So a scene and its
reversal, worded with equal Generators, get the same templates and synonyms: the captions of twins differ only in what
happens, and no word reveals which of the two is meant.
"""

import itertools
import re

import numpy as np
from jaxtyping import Float, Int

from vlab_jax.data.schema import Question
from vlab_jax.datasets.motion.scene import FAMILIES, FAMILY, GLYPH_KINDS, Scene, Shape, X, Y

CAPTIONS = 4  # of an example, each from a template of its own
# Per motion: synonyms, each as (present, perfect). A motion and its inverse have matching rows.
PHRASES = {
    "left": (("moves left", "moved left"), ("slides to the left", "slid to the left")),
    "right": (("moves right", "moved right"), ("slides to the right", "slid to the right")),
    "up": (("moves up", "moved up"), ("slides upwards", "slid upwards")),
    "down": (("moves down", "moved down"), ("slides downwards", "slid downwards")),
    "grow": (("grows", "grown"), ("gets bigger", "become bigger")),
    "shrink": (("shrinks", "shrunk"), ("gets smaller", "become smaller")),
    **{
        turn: ((f"turns {turn}", f"turned {turn}"), (f"rotates {turn}", f"rotated {turn}")) for turn in FAMILIES["turn"]
    },
    "appear": (("appears", "appeared"), ("becomes visible", "become visible")),
    "vanish": (("vanishes", "vanished"), ("becomes invisible", "become invisible")),
}
_SYNONYMS = 2
_FAMILY_INDEX = {motion: list(FAMILIES).index(family) for motion, family in FAMILY.items()}

# [n] is the clause of the n-th event, [n+] its perfect, [n-] its verb alone; {a} is the one actor, {rest} the other
# shape.
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
_TWO_EVENTS = ("[1], then [2]", "first [1], then [2]", "[1]; after that, [2]", "[2] after [1+]", "[1] before [2]")
# Of stills; templates with a word that is in doubt ({place}, {relation}) are left out.
_STILL_ONE_SHAPE = (
    "{a}",
    "a photo of {a}",
    "there is {a}",
    "one shape: {a}",
    "{a} on {ground} background",
    "{a} {place}",
    "a picture of {a} {place}",
)
_STILL_TWO_SHAPES = (
    "{a} and {b}",
    "a photo of {a} and {b}",
    "there is {a} and there is {b}",
    "two shapes: {a} and {b}",
    "{a} and {b} on {ground} background",
    "{a} {relation} {b}",
    "{a} {place} and {b}",
)


def _noun(shape: Shape) -> str:
    return f"{shape.colour} {shape.kind}"


def _a(words: str) -> str:
    """The words with their indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def captions(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    """Captions of the scene's whole story, from different templates."""
    synonyms = rng.integers(_SYNONYMS, size=(CAPTIONS, len(scene.shapes), len(FAMILIES)))
    if len(scene.events) > 1:
        templates = _TWO_EVENTS
    else:
        templates = _ONE_EVENT + (_ONE_EVENT_AND_REST if len(scene.shapes) > 1 else ())
    chosen = rng.permutation(len(templates))[:CAPTIONS]
    return tuple(_fill(templates[t], scene, s) for t, s in zip(chosen, synonyms, strict=True))


def _fill(template: str, scene: Scene, synonyms: Int[np.ndarray, "shapes families"]) -> str:
    """Fills in the clauses; a shape that the previous clause was about is 'it'."""
    mentioned: list[int] = []

    def clause(match: re.Match[str]) -> str:
        event = scene.events[int(match[1]) - 1]
        present, perfect = PHRASES[event.motion][synonyms[event.shape, _FAMILY_INDEX[event.motion]]]
        again = mentioned[-1:] == [event.shape]
        mentioned.append(event.shape)
        subject = "it" if again else f"the {_noun(scene.shapes[event.shape])}"
        return {"": f"{subject} {present}", "+": f"{subject} has {perfect}", "-": present}[match[2]]

    actor = scene.events[0].shape
    rest = "".join(f"the {_noun(shape)}" for i, shape in enumerate(scene.shapes) if i != actor)
    return re.sub(r"\[(\d)([+-]?)\]", clause, template).format(a=_a(_noun(scene.shapes[actor])), rest=rest)


def questions(scene: Scene, rng: np.random.Generator, every: bool = False) -> tuple[Question, ...]:
    """One question of each type (appearance, motion, order) that the scene has an answer to, or `every` question."""
    by_type = _appearance_questions(scene.shapes), _motion_questions(scene, rng), _order_questions(scene, rng)
    if every:
        return tuple(itertools.chain(*by_type))
    # Drawn for every type, so that a scene and its reversal get the same questions.
    picks = rng.random(len(by_type))
    return tuple(some[int(pick * len(some))] for some, pick in zip(by_type, picks, strict=True) if some)


def _appearance_questions(shapes: tuple[Shape, ...]) -> list[Question]:
    """Questions that one frame answers: a colour, a shape, the count."""
    found = [Question("how many shapes are there?", str(len(shapes)), "appearance")]
    for shape in shapes:
        found.append(Question(f"what colour is the {shape.kind}?", shape.colour, "appearance"))
        found.append(Question(f"what shape is {shape.colour}?", shape.kind, "appearance"))
    return found


def _motion_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions on what one shape does; given the question, all its answers are equally likely."""
    found = []
    for index, shape in enumerate(scene.shapes):
        step = -1 if rng.integers(2) else 1
        motions = [event.motion for event in scene.events if event.shape == index]
        if len(motions) == 1:
            found.append((f"what does the {_noun(shape)} do?", PHRASES[motions[0]][0][0]))
        moves = [motion for motion in motions if FAMILY[motion] in ("horizontal", "vertical")]
        if len(moves) == 1:
            found.append((f"which way does the {_noun(shape)} move?", moves[0]))
        for family, verb in (("size", ""), ("turn", "turn "), ("presence", "")):
            for motion in set(motions) & set(FAMILIES[family]):
                one, other = FAMILIES[family][::step]
                found.append((f"does the {_noun(shape)} {verb}{one} or {other}?", motion))
    return [Question(question, answer, "motion") for question, answer in found]


def _order_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions on which of two things comes first; the question names both, in an order drawn with `rng`.

    If a shape appears or vanishes and does something else, too, grammar would reveal the order: there is no question.
    """
    swaps = rng.integers(2, size=2)
    actors = {event.shape for event in scene.events}
    fades = any(FAMILY[event.motion] == "presence" for event in scene.events)
    if len(scene.events) < 2 or (fades and len(actors) == 1):
        return []
    names = [f"the {_noun(shape)}" for shape in scene.shapes]
    # Before the swap, the order does not depend on the direction of time.
    ordered = sorted(scene.events, key=lambda event: (event.shape, _FAMILY_INDEX[event.motion]))
    clauses = {event: f"{names[event.shape]} {PHRASES[event.motion][0][0]}" for event in ordered}
    one, other = list(clauses.values())[:: -1 if swaps[0] else 1]
    found = [Question(f"what happens first: {one} or {other}?", clauses[scene.events[0]], "order")]
    if len(actors) == 2:
        one, other = names[:: -1 if swaps[1] else 1]
        answer = names[scene.events[0].shape]
        found.append(Question(f"which shape acts first, {one} or {other}?", answer, "order"))
    return found


def twin_questions(own: str, twin: str, rng: np.random.Generator) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """One question for a clip and one for its twin: the same two options, in the same random order."""
    options = (own, twin)[:: -1 if rng.integers(2) else 1]
    return tuple((Question("which caption is true?", answer, "twin", options),) for answer in (own, twin))


def still_captions(scene: Scene, frame: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Captions of one frame, from different templates."""
    order = rng.permutation(len(scene.shapes))
    names = [_a(_noun(scene.shapes[i])) for i in order]
    centres = scene.states([frame])[order, 0][:, [X, Y]]
    words = {
        "a": names[0],
        "b": names[-1],
        "ground": _a(scene.background),
        "place": place(centres[0]),
        "relation": relation(centres[0], centres[-1]),
    }
    templates = _STILL_ONE_SHAPE if len(names) == 1 else _STILL_TWO_SHAPES
    true = [t for t in templates if all(word is not None or f"{{{name}}}" not in t for name, word in words.items())]
    return tuple(true[i].format(**words) for i in rng.permutation(len(true))[:CAPTIONS])


def place(centre: Float[np.ndarray, "2"]) -> str | None:
    """The position in the frame in words, if they are beyond doubt."""
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
    """The position of one thing relative to another, if one word for it is beyond doubt."""
    x, y = one - other
    if abs(x) > 2 * abs(y):
        return "to the left of" if x < 0 else "to the right of"
    if abs(y) > 2 * abs(x):
        return "above" if y < 0 else "below"
    return None


def still_questions(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    """Two questions of type appearance: on the count or the background, and on a colour or a kind."""
    count, *details = _appearance_questions(scene.shapes)
    ground = Question("what is the background like?", scene.background, "appearance")
    return (count, ground)[rng.integers(2)], details[rng.integers(len(details))]


def with_glyph(caption: str, kind: str) -> str:
    """The caption with a mention of a glyph."""
    return f"{caption}, with {_a(kind)} in the corner"


def glyph_question(kind: str) -> Question:
    """A question of type `glyph`, which a close look at one frame answers."""
    return Question("which mark is in the corner?", kind, "glyph")


def detail_question(caption: str, kind: str, rng: np.random.Generator) -> Question:
    """A question of type `detail`: the caption with a mention of each kind of glyph, in random order; one is true."""
    options = tuple(with_glyph(caption, GLYPH_KINDS[i]) for i in rng.permutation(len(GLYPH_KINDS)))
    return Question("which caption is true?", with_glyph(caption, kind), "detail", options)
