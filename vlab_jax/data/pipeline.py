"""Batches of clips from data sources: shuffled, mixed and decoded.

The clips, frames and captions of a training batch are a function of (seed, number of the batch): a run that resumes
continues with the batches that it would have had.
Dimensions: `b` clips of this process, `T` frames, `S` pixels, `L` text tokens, `Q` questions.
"""

import collections
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from vlab_jax.data import schema
from vlab_jax.data.batches import DEFAULT_MEMORY, Batches, ClipReader, FrameOptions, PrefetchMemory, Unreadable
from vlab_jax.data.sources import clip_hash
from vlab_jax.data.tokenizer import Tokenizer
from vlab_jax.errors import InputError

ATTEMPTS = 10  # clips tried in place of one that cannot be decoded


@dataclasses.dataclass(frozen=True)
class ReadForTraining:
    """Reads an element (number of the source, index in it): random frames, and the tokens of one random caption.

    A clip that cannot be decoded is replaced by another of the same source, drawn with the element's generator, and
    `failures` says which and why. The fields are those of `training_batches`.
    """

    reader: ClipReader
    tokenizer: Tokenizer
    questions: int
    without: tuple[str, ...]
    captions: bool
    datasets: tuple[str, ...]

    def __call__(self, element: tuple[int, int], rng: np.random.Generator) -> dict[str, Any]:
        number, index = element
        failures = []
        for _ in range(ATTEMPTS):
            try:
                clip, frames = self.reader.read(number, index, rng)
            except Unreadable as error:
                failures.append(str(error))
                index = int(rng.integers(len(self.reader.sources[number])))
                continue
            if self.captions and not clip.captions:
                raise InputError(
                    f"clip {clip.id!r} has no caption to learn from; of questions alone learn with "
                    "objectives.question_answering, every other objective 0"
                )
            caption = clip.captions[rng.integers(len(clip.captions))] if clip.captions else ""
            tokens, lengths = self.tokenizer([caption])
            # The first data set's clips are hashed as where it stands alone.
            other = "" if not self.datasets or self.datasets[number] == self.datasets[0] else self.datasets[number]
            return {
                "video": frames,
                "tokens": tokens[0],
                "lengths": lengths[0],
                "clip": clip_hash(clip.id, other),
                "ids": [clip.id],
                "failures": failures,
                **(self._draw_questions(clip, rng) if self.questions else {}),
            }
        raise InputError(f"{ATTEMPTS} clips in a row cannot be decoded; the last: {failures[-1]}")

    def _draw_questions(self, clip: schema.ClipRecord, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The tokens of distinct questions and their answers, padded with questions that have no answer tokens."""
        allowed = [question for question in clip.questions if question.type not in self.without]
        chosen = _alternate_types([allowed[i] for i in rng.permutation(len(allowed))])[: self.questions]
        padded = chosen + [schema.Question("", "")] * (self.questions - len(chosen))
        tokens, lengths, starts = self.tokenizer.pairs([q.question for q in padded], [q.answer for q in padded])
        lengths[len(chosen) :] = starts[len(chosen) :]
        return {"question_tokens": tokens, "question_lengths": lengths, "answer_starts": starts}


def _alternate_types(questions: Sequence[schema.Question]) -> list[schema.Question]:
    """The questions, first one of each type, then a second of each: many of one type do not crowd out the others."""
    turns: collections.Counter[str] = collections.Counter()

    def turn(question: schema.Question) -> int:
        turns[question.type] += 1
        return turns[question.type]

    return sorted(questions, key=turn)


def training_batches(
    sources: Sequence[Sequence],
    weights: Sequence[float],
    frames: FrameOptions,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seed: int,
    first: int = 0,
    process: int = 0,
    processes: int = 1,
    workers: int = 0,
    memory: PrefetchMemory = DEFAULT_MEMORY,
    questions: int = 0,
    without: tuple[str, ...] = (),
    captions: bool = True,
    datasets: Sequence[str] = (),
) -> Batches:
    """An endless iterator over training batches, from number `first` on; close it when done.

    Args:
      sources: data sources of the schema, each with its weight in the mixture.
      batch_size: clips of a batch over all processes; this process gets `batch_size / processes` of them.
      workers, memory: as in `Batches`.
      questions: how many are drawn of each clip, one of each type before a second of any.
      without: types of questions that are not drawn.
      captions: whether each clip must have a caption.
      datasets: the data set of each source (`sources.dataset_names`): equal ids in two of them are two clips. Empty:
        all sources are of one.

    Yields:
      `video` uint8 `[b, T, S, S, 3]`, `tokens` int32 `[b, L]`, `lengths` int32 `[b]`, `clip` int32 `[b]` (equal
      for equal clips), `ids` (the clips') and `failures` (strings: clips that could not be decoded and were replaced);
      with `questions` also `question_tokens` int32 `[b, Q, L]`, `question_lengths` and `answer_starts` int32 `[b, Q]`,
      which are equal where a clip has no further question.

    Raises `InputError` where a source is empty, and where the batch does not divide over the processes.
    """
    if batch_size % processes:
        raise InputError(f"a batch of {batch_size} clips does not divide over {processes} processes")
    if not all(len(source) for source in sources):
        raise InputError("a training split is empty; nothing can be drawn from it")
    streams = [
        grain.MapDataset.range(len(source))
        .map(functools.partial(_numbered, number))
        .shuffle(seed=seed + number)
        .repeat()
        for number, source in enumerate(sources)
    ]
    mixed = grain.MapDataset.mix(streams, weights=list(weights)) if len(streams) > 1 else streams[0]
    reader = ClipReader(sources, frames)
    read = ReadForTraining(reader, tokenizer, questions, without, captions, tuple(datasets))
    clips, first = mixed.random_map(read, seed=seed), first * processes + process
    return Batches(clips, reader, batch_size // processes, memory, workers, first, processes)


def _numbered(number: int, index: int) -> tuple[int, int]:
    return number, index


def read_for_evaluation(reader: ClipReader, index: int) -> dict[str, Any]:
    """Reads an index of a source: centre frames; a clip that cannot be decoded is black and not `valid`."""
    try:
        frames, failures = reader.read(0, index, None)[1], []
    except Unreadable as error:
        options = reader.frames
        frames = np.zeros((options.num_frames, options.size, options.size, 3), np.uint8)
        failures = [str(error)]
    return {"video": frames, "index": np.int32(index), "valid": not failures, "failures": failures}


def evaluation_batches(
    source: Sequence,
    frames: FrameOptions,
    *,
    batch_size: int,
    workers: int = 0,
    process: int = 0,
    processes: int = 1,
    memory: PrefetchMemory = DEFAULT_MEMORY,
) -> Batches:
    """Every clip of a source once, in order, in batches of one size; close the iterator when done.

    Each process gets its share of the batches, which do not depend on the number of processes. `workers` and `memory`
    are as in `Batches`, with its errors.

    Yields:
      `video` uint8 `[b, T, S, S, 3]`, `index` int32 `[b]` (-1 for padding), `valid` bool `[b]` and `failures`.
    """
    reader = ClipReader([source], frames)
    clips = grain.MapDataset.range(len(source)).map(functools.partial(read_for_evaluation, reader))
    return Batches(clips, reader, batch_size, memory, workers, process, processes)


@dataclasses.dataclass
class FailureCount:
    """Counts the clips that could not be decoded, logs each once, and stops the run when they are too many.

    `limit` is the largest share of failed clips, of the clips seen, of `whole` or of 1,000, whichever is the most.
    """

    limit: float
    seen: int = 0  # clips so far, saved with a checkpoint, as `failed`
    failed: int = 0
    whole: int = 0  # all clips, where their number is known beforehand
    last: str = ""  # the last failure, in words
    named: set[str] = dataclasses.field(default_factory=set)
    _joined: tuple[int, int] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self._joined = (self.seen, self.failed)

    def update(self, clips: int, failures: Sequence[str]) -> None:
        """Counts a batch; raises `InputError` where more than `limit` of the clips failed."""
        self.seen += clips + len(failures)
        self.failed += len(failures)
        for failure in failures:
            if failure not in self.named:
                self.named.add(failure)
                logging.warning("skipped a clip that cannot be decoded: %s", failure)
        if failures:
            self.last = failures[-1]
            self._check()

    def join(self, gathered: Callable[[tuple[int, int, str]], list[tuple[int, int, str]]]) -> None:
        """Adds what all processes have counted since the last time, or since the start; raises as `update`.

        `gathered` returns all processes' values for this process's.
        """
        seen, failed = self._joined
        counts = gathered((self.seen - seen, self.failed - failed, self.last))
        self.seen, self.failed = (before + sum(each[i] for each in counts) for i, before in enumerate(self._joined))
        self._joined = (self.seen, self.failed)
        self.last = next((last for _, failed, last in counts if failed), self.last)
        self._check()

    def _check(self) -> None:
        if self.failed > self.limit * max(self.seen, self.whole, 1000):
            raise InputError(
                f"{self.failed} of {self.seen} clips could not be decoded, more than data.max_failed_share="
                f"{self.limit:g}; the last: {self.last}"
            )
