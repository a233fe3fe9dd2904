"""The `motion` data set: short clips of coloured shapes in motion, rendered when it is first used.

Made by this project (licence Apache-2.0) so that training, evaluation and tests run without a download.
Scenes, pixels and words come from `motion_scene`, `motion_render` and `motion_text`.

Configurations and their splits (examples in train / validation / test):

- `video` (default; 4000 / 160 / 400): H.264 clips of 24 frames at 12 frames a second, 48 x 48. One or two
  shapes carry out one or two events. Four captions each, and questions of type `appearance` (answered by one
  frame), `motion` (which way, what) and `order` (what first): one of each type, and in training all that the
  clip answers. The clips of validation and test come in *twins*, 80 and 200 pairs: the same frames in reverse
  order, with the captions of the reversed motion. Their question of type `twin` offers the clip's own caption
  and its twin's.
- `large` (16000 / 160 / 400): the same, and the same clips in validation and test, with more to train on.
- `still` (6000 / 200 / 400): one frame of such a scene as a JPEG, all its shapes in full view, with captions
  and questions on appearance alone. An image model learns the shapes here; many images share a caption.
- `glyphs` and `glyphs_still`: `large` and `still` with a *glyph* in each picture (`motion_glyph`), a detail that
  stills teach and videos hardly mention: the words of all stills tell it, and of 5 % of the training clips. In
  validation and test, where `glyphs` asks for it, every other caption tells it; a question of type `glyph` asks
  which it is, and one of type `detail` offers a caption told with each kind.
- `tiny` (48 / 16 / 16) and `tiny_still` (48 / 16 / 16): the same in small, for tests.

What is balanced: a scene played backwards is as likely as the scene, so a bag of frames tells nothing of
time's direction, and on twins it scores 50 % by construction. Twin captions share their template and their
synonyms, and the options of both twins are in the same order. Given the text of a `motion` question its
answers are equally likely, and an `order` question names both candidates in random order. Text alone is at
chance.

What is held out: a quarter of all stories (who does what, in which order), each together with its reversal,
chosen by a hash. Validation and test tell these alone, no two clips of theirs the same; training tells none of
them, and the other three quarters whatever the number of events. Stills have few stories: they are drawn
independently.

Mirroring a clip or image makes its captions false (left and right, clockwise): don't augment with flips.

Determinism: the same version, seed and libraries (NumPy, libx264, Pillow) give the same bytes.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float, Float32, UInt8

from vlab_jax.data import schema
from vlab_jax.data.schema import Question
from vlab_jax.datasets.clip_builder import ClipBuilder
from vlab_jax.datasets.motion.render import encode_image, encode_video, render
from vlab_jax.datasets.motion.scene import FRAMES, Scene, X, Y, draw_scene
from vlab_jax.datasets.motion.text import (
    a,
    all_questions,
    appearance_questions,
    captions,
    noun,
    questions,
    twin_questions,
)
from vlab_jax.errors import InputError

# FOLDED vlab_jax/datasets/motion/builder.py: Captions and questions of `motion/still`: what one frame
# shows, and nothing of motion.

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


# FOLDED vlab_jax/datasets/motion/builder.py: Glyphs of the `motion` data set: a small white mark in a corner of
# the frame, which stays as it is through the clip.  One frame shows all of it, and it has to be looked at closely:
# a detail for models of stills. Which clips' words tell of it, a `MotionConfig` says.

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


SPLITS = ("train", "validation", "test")
# The share of stories that no training clip tells.
HELD_OUT = 0.25
# Scenes drawn in search of one new story before the stories are taken to be used up.
_MOST_DRAWS = 5_000


@dataclasses.dataclass(eq=False, kw_only=True)
class MotionConfig(tfds.core.BuilderConfig):
    """One configuration of `motion`.

    Attributes:
      train, validation, test: examples in each split; without `still`, the last two are even (twin pairs).
      still: one frame instead of a clip.
      resolution: side of the square frame in pixels, even.
      event_weights: the chances of 1, 2, ... (at most 3) events in a scene.
      glyphs: whether each picture has a glyph.
      glyphs_told: the share of training examples whose captions and questions tell it.
      seed: every random choice follows from it.
    """

    train: int = 4000
    validation: int = 160
    test: int = 400
    still: bool = False
    resolution: int = 48
    event_weights: tuple[float, ...] = (0.5, 0.5)
    glyphs: bool = False
    glyphs_told: float = 0.0
    seed: int = 0

    @property
    def clips(self) -> int:
        """Examples in all splits, for a progress bar."""
        return self.train + self.validation + self.test


_SMALL = {"train": 48, "validation": 16, "test": 16}


class Motion(ClipBuilder):
    """Shapes in motion; see the module's text."""

    VERSION = tfds.core.Version("2.1.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {
        "2.2.0": "The words of all stills tell their glyph.",
        "2.1.0": "Training clips have every question that they answer.",
        "2.0.0": "Three kinds of shapes, a little larger; more scenes with two.",
        "1.0.0": "First version.",
    }
    BUILDER_CONFIGS: ClassVar[list[MotionConfig]] = [
        MotionConfig(name="video", description="Clips of 24 frames, with twins in validation and test."),
        MotionConfig(name="large", description="`video` with more training clips.", train=16000),
        MotionConfig(name="still", description="Single frames.", still=True, train=6000, validation=200, test=400),
        MotionConfig(name="glyphs", description="`large` with glyphs.", train=16000, glyphs=True, glyphs_told=0.05),
        MotionConfig(
            name="glyphs_still",
            version=tfds.core.Version("2.2.0"),
            description="`still` with glyphs.",
            still=True,
            train=6000,
            validation=200,
            test=400,
            glyphs=True,
            glyphs_told=1.0,
        ),
        MotionConfig(name="tiny", description="`video` in small, for tests.", **_SMALL),
        MotionConfig(name="tiny_still", description="`still` in small, for tests.", still=True, **_SMALL),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=schema.features(),
            license="Apache-2.0",
        )

    def clips(self) -> dict[str, Iterator[schema.ClipRecord]]:
        """The clips of each split, rendered as they are asked for."""
        clips = still_clips if self.builder_config.still else video_clips
        return {split: clips(self.builder_config, split) for split in SPLITS}


def still_clips(config: MotionConfig, split: str) -> Iterator[schema.ClipRecord]:
    """The images of a split: a frame of a scene each, drawn independently."""
    for index in range(getattr(config, split)):
        rng = _generator(config, split, index)
        scene = draw_scene(rng, config.event_weights)
        frame = int(rng.integers(FRAMES))
        pixels = render(scene, config.resolution, [frame], unfaded=True)
        said, asked = still_captions(scene, frame, rng), still_questions(scene, rng)
        pixels, said, asked = _with_glyph(config, split, index, pixels, said, asked)
        yield schema.ClipRecord(f"{split}-{index:05d}", encode_image(pixels[0]), captions=said, questions=asked)


def video_clips(config: MotionConfig, split: str) -> Iterator[schema.ClipRecord]:
    """The clips of a split; those of validation and test as twins, one after the other."""
    if split != "train":
        for index, scene in enumerate(held_out_scenes(config)[split]):
            yield from _twins(scene, config, split, index)
        return
    for index in range(config.train):
        rng = _generator(config, split, index)
        scene = _draw(rng, config, lambda scene: not is_held_out(scene, config.seed))
        said, asked = captions(scene, rng), all_questions(scene, rng)
        frames, said, asked = _with_glyph(config, split, index, render(scene, config.resolution), said, asked)
        yield schema.ClipRecord(f"train-{index:05d}", encode_video(frames), captions=said, questions=asked)


def held_out_scenes(config: MotionConfig) -> dict[str, list[Scene]]:
    """The scenes of validation and test, one for each pair of twins, with stories that are all different."""
    scenes: dict[str, list[Scene]] = {}
    stories: set[Any] = set()
    for split in SPLITS[1:]:
        scenes[split] = []
        rng = _generator(config, split, 0)
        while len(scenes[split]) < getattr(config, split) // 2:
            scene = _draw(rng, config, lambda scene: scene.story() not in stories and is_held_out(scene, config.seed))
            stories.update((scene.story(), scene.reversed().story()))
            scenes[split].append(scene)
    return scenes


def is_held_out(scene: Scene, seed: int) -> bool:
    """Whether the scene's story, and with it its reversal's, is for validation and test alone."""
    story = min(str(one.story()) for one in (scene, scene.reversed()))
    return zlib.crc32(f"{seed} {story}".encode()) < HELD_OUT * 2**32


def _draw(rng: np.random.Generator, config: MotionConfig, wanted: Callable[[Scene], bool]) -> Scene:
    """The first scene drawn that is wanted. Raises InputError where there seems to be none."""
    for _ in range(_MOST_DRAWS):
        scene = draw_scene(rng, config.event_weights)
        if wanted(scene):
            return scene
    raise InputError(
        f"motion/{config.name}: no new story in {_MOST_DRAWS} scenes drawn; "
        "ask for fewer validation and test clips, or for more events"
    )


def _twins(scene: Scene, config: MotionConfig, split: str, index: int) -> Iterator[schema.ClipRecord]:
    """A clip and its twin: the same frames in reverse, worded with an equal Generator."""
    frames = render(scene, config.resolution)
    # Index 0 drew the scenes.
    wording = [_generator(config, split, index + 1) for _ in range(2)]
    both = (scene, scene.reversed())
    said = [captions(one, rng) for one, rng in zip(both, wording, strict=True)]
    asked = [questions(one, rng) for one, rng in zip(both, wording, strict=True)]
    twin = twin_questions(said[0][0], said[1][0], wording[0])
    for i, name in enumerate("ab"):
        pixels, words, questioned = _with_glyph(config, split, index, frames, said[i], asked[i] + twin[i])
        yield schema.ClipRecord(
            id=f"{split}-{index:04d}-{name}",
            media=encode_video(pixels if i == 0 else pixels[::-1]),
            captions=words,
            questions=questioned,
        )


def _with_glyph(
    config: MotionConfig,
    split: str,
    index: int,
    frames: UInt8[np.ndarray, "t h w 3"],
    said: tuple[str, ...],
    asked: tuple[schema.Question, ...],
) -> tuple[UInt8[np.ndarray, "t h w 3"], tuple[str, ...], tuple[schema.Question, ...]]:
    """An example's frames, captions and questions, with its glyph if the configuration has glyphs."""
    if not config.glyphs:
        return frames, said, asked
    rng = _generator(config, split, index, use=1)
    glyph = draw_glyph(rng)
    frames = stamp(frames, glyph)
    if split == "train":
        told = rng.random() < config.glyphs_told
        return frames, *((tell(glyph, said), (*asked, glyph_question(glyph))) if told else (said, asked))
    questions = (glyph_question(glyph), detail_question(said[0], glyph, rng))
    return frames, tell(glyph, said, every=2), asked + questions


def _generator(config: MotionConfig, split: str, index: int, use: int = 0) -> np.random.Generator:
    """The Generator of one use in one example: it depends on these and the seed alone."""
    uses = (use,) if use else ()
    return np.random.default_rng([config.seed, int(config.still), SPLITS.index(split), index, *uses])
