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
from jaxtyping import UInt8

from vlab_jax.data import schema
from vlab_jax.data.builders.clip_builder import ClipBuilder
from vlab_jax.data.builders.motion_glyph import detail_question, draw_glyph, glyph_question, stamp, tell
from vlab_jax.data.builders.motion_render import encode_image, encode_video, render
from vlab_jax.data.builders.motion_scene import FRAMES, Scene, draw_scene
from vlab_jax.data.builders.motion_still_text import still_captions, still_questions
from vlab_jax.data.builders.motion_text import all_questions, captions, questions, twin_questions
from vlab_jax.errors import InputError

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

    def clips(self) -> dict[str, Iterator[schema.Clip]]:
        """The clips of each split, rendered as they are asked for."""
        clips = still_clips if self.builder_config.still else video_clips
        return {split: clips(self.builder_config, split) for split in SPLITS}


def still_clips(config: MotionConfig, split: str) -> Iterator[schema.Clip]:
    """The images of a split: a frame of a scene each, drawn independently."""
    for index in range(getattr(config, split)):
        rng = _generator(config, split, index)
        scene = draw_scene(rng, config.event_weights)
        frame = int(rng.integers(FRAMES))
        pixels = render(scene, config.resolution, [frame], unfaded=True)
        said, asked = still_captions(scene, frame, rng), still_questions(scene, rng)
        pixels, said, asked = _with_glyph(config, split, index, pixels, said, asked)
        yield schema.Clip(f"{split}-{index:05d}", encode_image(pixels[0]), captions=said, questions=asked)


def video_clips(config: MotionConfig, split: str) -> Iterator[schema.Clip]:
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
        yield schema.Clip(f"train-{index:05d}", encode_video(frames), captions=said, questions=asked)


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


def _twins(scene: Scene, config: MotionConfig, split: str, index: int) -> Iterator[schema.Clip]:
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
        yield schema.Clip(
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
