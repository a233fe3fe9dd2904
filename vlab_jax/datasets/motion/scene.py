"""Scenes of the `motion` data set: which shapes there are, what they do, and where (our own design).

A scene is one or two coloured shapes that carry out a sequence of events one after another; each event is one
shape's motion and takes an equal share of the clip, while the other shape rests. Everything is drawn from a
distribution that is closed under time reversal: the scene played backwards (events in reverse order, each
motion inverted) is again a scene, and as likely. So nothing in a single frame, or in a bag of frames, says
which way time runs.

Lengths are fractions of the frame's side, x to the right and y down; angles are radians, clockwise on screen.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

FRAMES = 24
COLOURS = ("red", "green", "blue", "yellow")
KINDS = ("circle", "ring", "bar")  # a square of this size looks like a circle to a vision transformer of large patches
# Kinds whose turning is plain to see in 8 frames of a small picture; half a turn brings a bar back to its looks.
TURNING = ("bar",)
TWO_SHAPES = 0.5
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

# The columns of a track.
X, Y, RADIUS, ANGLE, OPACITY = range(5)
# A shape lies within this many radii of its centre.
REACH = 1.2
_MARGIN = 0.02


@dataclasses.dataclass(frozen=True)
class Shape:
    """A shape as words name it: its `colour` (of `COLOURS`) and its `kind` (of `KINDS`)."""

    colour: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Event:
    """One shape's motion: the shape's index within its scene, and one of `MOTIONS`."""

    shape: int
    motion: str


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """What a clip shows.

    `tracks` holds the state of each shape (x, y, radius, angle, opacity) at the boundaries of the events;
    between two boundaries it changes evenly, so that shapes fade in and out.
    The `background` is a kind of `BACKGROUNDS`, and `background_seed` draws the rest of it.
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
        """What a caption says: who does what, in order. It tells a scene from all with other stories."""
        return tuple((self.shapes[event.shape], event.motion) for event in self.events)

    def states(self, frames: Sequence[int] = range(FRAMES)) -> Float[np.ndarray, "shapes t 5"]:
        """The state of each shape (the columns of `tracks`) in the middle of each of these frames."""
        time = (np.asarray(frames) + 0.5) / FRAMES * len(self.events)
        event = time.astype(int)
        passed = (time - event)[:, None]
        return (1 - passed) * self.tracks[:, event] + passed * self.tracks[:, event + 1]


def motions_of(kind: str) -> tuple[str, ...]:
    """The motions that are plain to see on a shape of this kind: a circle's turning is not."""
    return MOTIONS if kind in TURNING else tuple(m for m in MOTIONS if FAMILY[m] != "turn")


def draw_scene(rng: np.random.Generator, event_weights: Sequence[float] = (0.5, 0.5)) -> Scene:
    """A scene drawn with `rng`; `event_weights[n - 1]` is the chance of `n` events (1 to 3)."""
    shapes = _draw_shapes(rng)
    events = _draw_events(rng, shapes, 1 + int(rng.choice(len(event_weights), p=event_weights)))
    return Scene(
        shapes=shapes,
        events=events,
        tracks=_draw_tracks(rng, shapes, events),
        background=BACKGROUNDS[rng.integers(len(BACKGROUNDS))],
        background_seed=int(rng.integers(2**32)),
    )


def _draw_shapes(rng: np.random.Generator) -> tuple[Shape, ...]:
    """One shape, or two in `TWO_SHAPES` of the scenes; two differ in colour and kind, so that either word names one.

    Mostly it is one: clips of the same shape are what makes a model look at motion.
    """
    count = 1 + int(rng.random() < TWO_SHAPES)
    colours = rng.permutation(len(COLOURS))[:count]
    kinds = rng.permutation(len(KINDS))[:count]
    return tuple(Shape(COLOURS[c], KINDS[k]) for c, k in zip(colours, kinds, strict=True))


def _draw_events(rng: np.random.Generator, shapes: tuple[Shape, ...], count: int) -> tuple[Event, ...]:
    """Events drawn independently until they go together: so given who acts, no motion is favoured."""
    while True:
        actors = [int(i) for i in rng.integers(len(shapes), size=count)]
        choices = [motions_of(shapes[i].kind) for i in actors]
        motions = [choice[rng.integers(len(choice))] for choice in choices]
        events = tuple(Event(i, motion) for i, motion in zip(actors, motions, strict=True))
        if all(_consistent([e.motion for e in events if e.shape == i]) for i in range(len(shapes))):
            return events


def _consistent(motions: list[str]) -> bool:
    """Whether one shape can do all this: nothing twice or undone, first of all appear, last of all vanish."""
    families = [FAMILY[motion] for motion in motions]
    return len(set(families)) == len(families) and "appear" not in motions[1:] and "vanish" not in motions[:-1]


def _draw_tracks(
    rng: np.random.Generator, shapes: tuple[Shape, ...], events: tuple[Event, ...]
) -> Float[np.ndarray, "shapes boundaries 5"]:
    """Paths that stay inside the frame and apart from each other, drawn until they do."""
    # Half of the pairs need a few attempts; with three events, one in a thousand needs a thousand.
    for _ in range(100_000):
        tracks = np.stack([_draw_track(rng, i, events) for i in range(len(shapes))])
        if len(shapes) == 1 or _stay_apart(tracks):
            return tracks
    raise RuntimeError(f"no room in the frame for {shapes} with {events}: a bug in the ranges of sizes")


def _draw_track(rng: np.random.Generator, index: int, events: tuple[Event, ...]) -> np.ndarray:
    """One shape's state at the boundaries of the events.

    The path is drawn as a figure without direction (its extent, then where it lies), so that it is as likely
    as its reversal.
    """
    motions = [event.motion if event.shape == index else None for event in events]
    track = np.zeros((len(events) + 1, 5))
    track[:, RADIUS] = _draw_radii(rng, motions)
    # Less than the half turn that looks like none, and slow enough for 8 frames to tell the direction.
    track[:, ANGLE] = _steps(motions, "clockwise", "anticlockwise", rng.uniform(0.6, 0.9) * np.pi)
    track[:, ANGLE] += rng.uniform(0, 2 * np.pi) - track[:, ANGLE].mean()
    # Two shapes with three events between them have less room.
    shortest, longest = (0.45, 0.52) if len(events) < 3 else (0.3, 0.36)
    for column, (minus, plus) in ((X, FAMILIES["horizontal"]), (Y, ("up", "down"))):
        path = _steps(motions, plus, minus, rng.uniform(shortest, longest))
        reach = _MARGIN + REACH * track[:, RADIUS].max()
        track[:, column] = path + rng.uniform(reach - path.min(), 1 - reach - path.max())
    track[:, OPACITY] = 1
    if "appear" in motions:
        track[: motions.index("appear") + 1, OPACITY] = 0
    if "vanish" in motions:
        track[motions.index("vanish") + 1 :, OPACITY] = 0
    return track


def _draw_radii(rng: np.random.Generator, motions: list[str | None]) -> np.ndarray:
    """Radii at the boundaries: constant, but for a size event between a small radius and a large one."""
    small, ratio, constant = rng.uniform(0.075, 0.083), rng.uniform(2.0, 2.2), rng.uniform(0.125, 0.165)
    change = _steps(motions, "grow", "shrink", small * (ratio - 1))
    return small + change - change.min() if change.any() else np.full(len(change), constant)


def _steps(motions: list[str | None], plus: str, minus: str, amount: float) -> np.ndarray:
    """A quantity from 0 that one motion raises and its inverse lowers, at the boundaries of the events."""
    changes = [amount * ((motion == plus) - (motion == minus)) for motion in motions]
    return np.concatenate([[0.0], np.cumsum(changes)])


def _stay_apart(tracks: np.ndarray) -> bool:
    """Whether two shapes never touch (also while one is unseen): looked at eight times in each event."""
    passed = np.linspace(0, 1, 8, endpoint=True)[:, None, None, None]
    a, b = np.moveaxis((1 - passed) * tracks[:, :-1] + passed * tracks[:, 1:], 1, 0)
    distance = np.hypot(a[..., X] - b[..., X], a[..., Y] - b[..., Y])
    return bool((distance > REACH * (a[..., RADIUS] + b[..., RADIUS])).all())
