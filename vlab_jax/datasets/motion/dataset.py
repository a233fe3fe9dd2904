"""The `motion` data set: short clips of coloured shapes in motion, rendered when it is first used.

Made by this project (licence Apache-2.0), so that training, evaluation and tests run without a download. The
configurations (and their examples in train / validation / test):

- `video` (default; 4000 / 160 / 400): H.264 clips of 24 frames at 12 frames a second, 48 x 48. One or two shapes carry
  out one or two events. Each clip has four captions, and questions of type `appearance` (answered by one frame),
  `motion` (which way, what) and `order` (what first): one of each type, and in training all that the clip answers. The
  clips of validation and test come in time-reversed pairs (*twins*): the same frames in reverse order, with the
  captions of the reversed motion. Their question of type `twin` offers the clip's own caption and its twin's.
- `large` (16000 / 160 / 400): the same, with the same clips in validation and test, and more to train on.
- `still` (6000 / 200 / 400): one frame of such a scene as a JPEG, with all its shapes in full view, and with captions
  and questions on appearance only. An image model learns the shapes here; many images share a caption.
- `glyphs` and `glyphs_still`: `large` and `still` with a *glyph* in each picture, a small white mark in a corner. One
  frame shows it completely, but it takes a close look: a detail that stills teach and videos hardly mention. The texts
  of all stills mention it, and those of 5 % of the training clips. In validation and test of `glyphs`, every other
  caption mentions it; a question of type `glyph` asks which it is, and one of type `detail` offers a caption with each.
- `tiny` and `tiny_still` (48 / 16 / 16): `video` and `still` in small, for tests.

Balance: a scene played backwards is as likely as the scene, so a bag of frames says nothing of time's direction, and on
twins it scores 50 % by construction. The captions of twins share their template and their synonyms, and the options of
both twins are in the same order. Given the text of a `motion` question, its answers are equally likely, and an `order`
question names both candidates in random order. Text alone is at chance.

Held out is a quarter of all stories (who does what, in which order), each together with its reversal, chosen by a hash.
Only validation and test have these, and no two of their clips are the same. Stills have few stories: they are drawn
independently.

Mirroring a clip or image makes its captions false (left and right, clockwise): do not augment with flips. The same
version, seed and libraries (NumPy, libx264, Pillow) give the same bytes.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vlab_jax.data.schema import ClipRecord, Question
from vlab_jax.datasets.annotations import SPLITS, AnnotationSource
from vlab_jax.datasets.motion import text
from vlab_jax.datasets.motion.render import encode_image, encode_video, render, stamp
from vlab_jax.datasets.motion.scene import FRAMES, Scene, draw_glyph, draw_scene
from vlab_jax.datasets.records import BuildOptions, ClipDataset
from vlab_jax.errors import InputError

_HELD_OUT = 0.25  # the share of stories that training does not have
_MAX_DRAWS = 5_000  # scenes drawn for one new story before the stories are taken to be used up


@dataclasses.dataclass(frozen=True, kw_only=True)
class MotionConfig:
    """A configuration of `motion`.

    Attributes:
      train, validation, test: examples in each split; without `still`, the last two are even (pairs of twins).
      still: one frame instead of a clip.
      event_weights: the probabilities of 1 and 2 events in a scene.
      glyph_share: the share of training examples whose texts mention their glyph; None: pictures have no glyphs.
      seed: of every random choice.
    """

    name: str
    version: str = "2.1.0"
    train: int = 4000
    validation: int = 160
    test: int = 400
    still: bool = False
    event_weights: tuple[float, ...] = (0.5, 0.5)
    glyph_share: float | None = None
    seed: int = 0


_STILL = MotionConfig(name="still", still=True, train=6000, validation=200)
_TINY = MotionConfig(name="tiny", train=48, validation=16, test=16)
CONFIGS: dict[str, MotionConfig] = {
    config.name: config
    for config in (
        MotionConfig(name="video"),
        MotionConfig(name="large", train=16000),
        _STILL,
        MotionConfig(name="glyphs", train=16000, glyph_share=0.05),
        dataclasses.replace(_STILL, name="glyphs_still", version="2.2.0", glyph_share=1.0),
        _TINY,
        dataclasses.replace(_TINY, name="tiny_still", still=True),
    )
}


class MotionDataset:
    """The data set with its configurations."""

    name = "motion"
    configs = tuple(CONFIGS)

    def dataset(self, config: str, options: BuildOptions) -> ClipDataset:
        """The data set of a configuration; `video` if the name is empty."""
        chosen = CONFIGS[config or "video"]
        clips = still_clips if chosen.still else video_clips
        return ClipDataset(
            name=self.name,
            config=chosen.name,
            clips=lambda: {split: clips(chosen, split) for split in SPLITS},
            description=__doc__,
            version=chosen.version,
            license="Apache-2.0",
            num_clips=chosen.train + chosen.validation + chosen.test,
        )

    def annotation_source(self, config: str, manual_dir: str) -> AnnotationSource:
        """Raises `InputError`: there are no annotations."""
        raise InputError(f"{self.name} is rendered by this project; there is nothing to check")


MOTION = MotionDataset()


def still_clips(config: MotionConfig, split: str) -> Iterator[ClipRecord]:
    """Renders the images of a split: a frame each of independently drawn scenes."""
    for index in range(getattr(config, split)):
        rng = _generator(config, split, index)
        scene = draw_scene(rng, config.event_weights)
        frame = int(rng.integers(FRAMES))
        texts, qa = text.still_captions(scene, frame, rng), text.still_questions(scene, rng)
        pixels = render(scene, frames=[frame], unfaded=True)
        yield _clip(config, split, index, f"{index:05d}", pixels, texts, qa)


def video_clips(config: MotionConfig, split: str) -> Iterator[ClipRecord]:
    """Renders the clips of a split; those of validation and test as twins, one after the other."""
    if split != "train":
        for index, scene in enumerate(held_out_scenes(config)[split]):
            yield from _twins(config, split, index, scene)
        return
    for index in range(config.train):
        rng = _generator(config, split, index)
        scene = _draw(rng, config, lambda scene: not is_held_out(scene, config.seed))
        texts, qa = text.captions(scene, rng), text.questions(scene, rng, every=True)
        yield _clip(config, split, index, f"{index:05d}", render(scene), texts, qa)


def held_out_scenes(config: MotionConfig) -> dict[str, list[Scene]]:
    """The scenes of validation and test, one for each pair of twins, each with a story of its own."""
    scenes: dict[str, list[Scene]] = {split: [] for split in SPLITS[1:]}
    stories: set[Any] = set()
    for split in scenes:
        rng = _generator(config, split, 0)
        for _ in range(getattr(config, split) // 2):
            scene = _draw(rng, config, lambda scene: scene.story() not in stories and is_held_out(scene, config.seed))
            stories.update((scene.story(), scene.reversed().story()))
            scenes[split].append(scene)
    return scenes


def is_held_out(scene: Scene, seed: int) -> bool:
    """Whether only validation and test may have the scene's story, and that of its reversal."""
    story = min(str(each.story()) for each in (scene, scene.reversed()))
    return zlib.crc32(f"{seed} {story}".encode()) < _HELD_OUT * 2**32


def _draw(rng: np.random.Generator, config: MotionConfig, accept: Callable[[Scene], bool]) -> Scene:
    for _ in range(_MAX_DRAWS):
        scene = draw_scene(rng, config.event_weights)
        if accept(scene):
            return scene
    raise InputError(
        f"motion/{config.name}: no new story in {_MAX_DRAWS} scenes drawn; "
        "ask for fewer validation and test clips, or for more events"
    )


def _twins(config: MotionConfig, split: str, index: int, scene: Scene) -> Iterator[ClipRecord]:
    """A clip and its twin: the same frames in reverse order, with texts drawn by equal Generators."""
    frames, both = render(scene), (scene, scene.reversed())
    rngs = [_generator(config, split, index + 1) for _ in both]  # index 0 drew the scenes
    texts = [text.captions(each, rng) for each, rng in zip(both, rngs, strict=True)]
    qa = [text.questions(each, rng) for each, rng in zip(both, rngs, strict=True)]
    choices = text.twin_questions(texts[0][0], texts[1][0], rngs[0])
    yield _clip(config, split, index, f"{index:04d}-a", frames, texts[0], qa[0] + choices[0])
    yield _clip(config, split, index, f"{index:04d}-b", frames[::-1], texts[1], qa[1] + choices[1])


def _clip(
    config: MotionConfig,
    split: str,
    index: int,
    name: str,
    frames: UInt8[np.ndarray, "t h w 3"],
    texts: tuple[str, ...],
    qa: tuple[Question, ...],
) -> ClipRecord:
    """An example, with its glyph if the configuration has glyphs."""
    if config.glyph_share is not None:
        rng = _generator(config, split, index, 1)
        glyph = draw_glyph(rng)
        frames = stamp(frames, glyph)
        question = text.glyph_question(glyph.kind)
        mentions = tuple(text.with_glyph(caption, glyph.kind) for caption in texts)
        if split != "train":
            qa = (*qa, question, text.detail_question(texts[0], glyph.kind, rng))
            texts = tuple(pair[i % 2] for i, pair in enumerate(zip(texts, mentions, strict=True)))
        elif rng.random() < config.glyph_share:
            texts, qa = mentions, (*qa, question)
    media = encode_image(frames[0]) if config.still else encode_video(frames)
    return ClipRecord(f"{split}-{name}", media, texts, qa)


def _generator(config: MotionConfig, split: str, index: int, *use: int) -> np.random.Generator:
    """The Generator of one use in one example; it depends on these and the seed only."""
    return np.random.default_rng([config.seed, int(config.still), SPLITS.index(split), index, *use])
