"""Scenes of the `motion` data set: which shapes there are, what they do, and where (our own design).

A scene is one or two coloured shapes that carry out one or two events, one after the other; an event is the motion of
one shape and takes an equal share of the clip, while the other shape rests. The distribution is closed under time
reversal: the scene played backwards (events in reverse order, each motion inverted) is again a scene, and as likely. So
nothing in a single frame, or in a bag of frames, reveals the direction of time.

Lengths are fractions of the frame's side, x to the right and y down; angles are radians, clockwise on screen.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

FRAMES = 24
COLOURS = ("red", "green", "blue", "yellow")
KINDS = ("circle", "ring", "bar")  # a square of this size looks like a circle to a vision transformer of large patches
# Kinds whose turning can be seen in 8 frames of a small picture; a bar looks the same after half a turn.
TURNING = ("bar",)
TWO_SHAPES = 0.5  # the chance of a second shape
BACKGROUNDS = ("plain", "shaded", "striped", "checked", "grainy")
# Each family holds a motion and its inverse in time.
FAMILIES = {
    "horizontal": ("left", "right"),
    "vertical": ("up", "down"),
    "size": ("grow", "shrink"),
    "turn": ("clockwise", "anticlockwise"),
    "presence": ("appear", "vanish"),
}
FAMILY = {motion: family for family, pair in FAMILIES.items() for motion in pair}
INVERSE = {a: b for pair in FAMILIES.values() for a, b in (pair, pair[::-1])}
MOTIONS = tuple(FAMILY)
GLYPH_KINDS = ("plus", "cross", "dash", "pillar", "dot", "box")
X, Y, RADIUS, ANGLE, OPACITY = range(5)  # the columns of a track
REACH = 1.2  # a shape lies within this many radii of its centre
_MARGIN = 0.02


class Shape(NamedTuple):
    """A shape: its `colour` (of `COLOURS`) and its `kind` (of `KINDS`)."""

    colour: str
    kind: str


class Event(NamedTuple):
    """One shape's motion: the shape's index within its scene, and one of `MOTIONS`."""

    shape: int
    motion: str


class Glyph(NamedTuple):
    """A small white mark in every frame of a clip: one of `GLYPH_KINDS`, and its centre `(x, y)`."""

    kind: str
    centre: tuple[float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """What a clip shows.

    Attributes:
      tracks: the state of each shape (x, y, radius, angle, opacity) at the boundaries of the events; between two
        boundaries it changes linearly, so shapes fade in and out.
      background: one of `BACKGROUNDS`; `background_seed` draws its details.
    """

    shapes: tuple[Shape, ...]
    events: tuple[Event, ...]
    tracks: Float[np.ndarray, "shapes boundaries 5"]
    background: str
    background_seed: int

    def reversed(self) -> "Scene":
        """The same scene with time running backwards."""
        events = tuple(Event(event.shape, INVERSE[event.motion]) for event in reversed(self.events))
        return dataclasses.replace(self, events=events, tracks=self.tracks[:, ::-1])

    def story(self) -> tuple[tuple[Shape, str], ...]:
        """Who does what, in order, as captions say it."""
        return tuple((self.shapes[event.shape], event.motion) for event in self.events)

    def states(self, frames: Sequence[int] = range(FRAMES)) -> Float[np.ndarray, "shapes t 5"]:
        """The state of each shape (the columns of `tracks`) in the middle of each of these frames."""
        time = (np.asarray(frames) + 0.5) / FRAMES * len(self.events)
        event = time.astype(int)
        passed = (time - event)[:, None]
        return (1 - passed) * self.tracks[:, event] + passed * self.tracks[:, event + 1]


def draw_scene(rng: np.random.Generator, event_weights: Sequence[float] = (0.5, 0.5)) -> Scene:
    """A scene drawn with `rng`; `event_weights[n - 1]` is the chance of `n` events (1 or 2)."""
    # Two shapes differ in colour and kind, so that either word names one.
    count = 1 + int(rng.random() < TWO_SHAPES)
    colours, kinds = (rng.permutation(len(words))[:count] for words in (COLOURS, KINDS))
    shapes = tuple(Shape(COLOURS[c], KINDS[k]) for c, k in zip(colours, kinds, strict=True))
    events = _draw_events(rng, shapes, 1 + int(rng.choice(len(event_weights), p=event_weights)))
    return Scene(
        shapes=shapes,
        events=events,
        tracks=_draw_tracks(rng, shapes, events),
        background=BACKGROUNDS[rng.integers(len(BACKGROUNDS))],
        background_seed=int(rng.integers(2**32)),
    )


def draw_glyph(rng: np.random.Generator) -> Glyph:
    """A glyph of a random kind near a random corner."""
    kind = GLYPH_KINDS[rng.integers(len(GLYPH_KINDS))]
    near = 6 / 48 + rng.uniform(-1 / 48, 1 / 48, 2)
    x, y = np.where(rng.integers(2, size=2), near, 1 - near)
    return Glyph(kind, (float(x), float(y)))


def _draw_events(rng: np.random.Generator, shapes: tuple[Shape, ...], count: int) -> tuple[Event, ...]:
    """Events drawn independently until they are consistent; so given who acts, no motion is favoured."""
    while True:
        actors = [int(i) for i in rng.integers(len(shapes), size=count)]
        choices = [[m for m in MOTIONS if FAMILY[m] != "turn" or shapes[i].kind in TURNING] for i in actors]
        motions = [choice[rng.integers(len(choice))] for choice in choices]
        events = tuple(Event(i, motion) for i, motion in zip(actors, motions, strict=True))
        if all(_consistent([e.motion for e in events if e.shape == i]) for i in range(len(shapes))):
            return events


def _consistent(motions: list[str]) -> bool:
    """Whether one shape can do all this: nothing twice or undone, `appear` first, `vanish` last."""
    families = {FAMILY[motion] for motion in motions}
    return len(families) == len(motions) and "appear" not in motions[1:] and "vanish" not in motions[:-1]


def _draw_tracks(
    rng: np.random.Generator, shapes: tuple[Shape, ...], events: tuple[Event, ...]
) -> Float[np.ndarray, "shapes boundaries 5"]:
    """Paths that stay inside the frame and apart from each other, drawn until they do: half of the pairs need a few."""
    while True:
        tracks = np.stack([_draw_track(rng, i, events) for i in range(len(shapes))])
        if len(shapes) == 1 or _stay_apart(tracks):
            return tracks


def _draw_track(rng: np.random.Generator, index: int, events: tuple[Event, ...]) -> Float[np.ndarray, "boundaries 5"]:
    """One shape's state at the boundaries of the events.

    The path is drawn without direction (its extent, then its position), so that it is as likely as its reversal.
    """
    motions = [event.motion if event.shape == index else None for event in events]
    track = np.zeros((len(events) + 1, 5))
    # The radius is constant, but for a size event between a small radius and a large one.
    small, ratio, constant = rng.uniform(0.075, 0.083), rng.uniform(2.0, 2.2), rng.uniform(0.125, 0.165)
    change = _steps(motions, "grow", "shrink", small * (ratio - 1))
    track[:, RADIUS] = small + change - change.min() if change.any() else constant
    # Less than half a turn, which looks like none, and slow enough for 8 frames to show the direction.
    track[:, ANGLE] = _steps(motions, "clockwise", "anticlockwise", rng.uniform(0.6, 0.9) * np.pi)
    track[:, ANGLE] += rng.uniform(0, 2 * np.pi) - track[:, ANGLE].mean()
    reach = _MARGIN + REACH * track[:, RADIUS].max()
    for column, plus, minus in ((X, "right", "left"), (Y, "down", "up")):
        path = _steps(motions, plus, minus, rng.uniform(0.45, 0.52))
        track[:, column] = path + rng.uniform(reach - path.min(), 1 - reach - path.max())
    track[:, OPACITY] = 1
    if "appear" in motions:
        track[: motions.index("appear") + 1, OPACITY] = 0
    if "vanish" in motions:
        track[motions.index("vanish") + 1 :, OPACITY] = 0
    return track


def _steps(motions: list[str | None], plus: str, minus: str, amount: float) -> Float[np.ndarray, " boundaries"]:
    """A quantity from 0 that one motion raises and its inverse lowers, at the boundaries of the events."""
    changes = [amount * ((motion == plus) - (motion == minus)) for motion in motions]
    return np.concatenate([[0.0], np.cumsum(changes)])


def _stay_apart(tracks: Float[np.ndarray, "2 boundaries 5"]) -> bool:
    """Whether two shapes never touch, invisible ones included, at eight times in each event."""
    passed = np.linspace(0, 1, 8, endpoint=True)[:, None, None, None]
    a, b = np.moveaxis((1 - passed) * tracks[:, :-1] + passed * tracks[:, 1:], 1, 0)
    distance = np.hypot(a[..., X] - b[..., X], a[..., Y] - b[..., Y])
    return bool((distance > REACH * (a[..., RADIUS] + b[..., RADIUS])).all())
