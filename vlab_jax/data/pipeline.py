"""Batches of clips: TFDS data sources, shuffled and mixed, decoded in worker processes.

Which clips a training batch holds, which frames, which of their captions: all of it is a function of (seed, number of
the batch). A run that resumes asks for the batches from where it stopped and gets what it would have got.

Dimensions: `b` clips of this process, `T` frames, `S` pixels, `L` text tokens.
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
from vlab_jax.data.batches import Batches, ClipReader, FrameOptions, Unreadable
from vlab_jax.data.pieces import DEFAULT_MEMORY, Pieces, PrefetchMemory, plan_prefetch
from vlab_jax.data.sources import identity
from vlab_jax.data.tokenizer import Tokenizer
from vlab_jax.errors import InputError

ATTEMPTS = 10  # clips tried in place of one that cannot be decoded


@dataclasses.dataclass(frozen=True)
class ReadForTraining:
    """Reads an element (number of the source, index in it): random frames, one random caption, its tokens.

    A clip that cannot be decoded is replaced by another of the same source, drawn from the element's generator, and
    its name and reason are handed on in `failures`. So many `questions` come along, of other types than those in
    `without`, one of each type before a second of any. Without `captions`, nothing is learned from those, and a clip
    may have none. `datasets` names each source's data set; empty: all are of one.
    """

    reader: ClipReader
    tokenizer: Tokenizer
    questions: int = 0
    without: tuple[str, ...] = ()
    captions: bool = True
    datasets: tuple[str, ...] = ()

    def __call__(self, element: tuple[int, int], rng: np.random.Generator) -> dict[str, Any]:
        number, index = element
        source = self.reader.sources[number]
        failures = []
        for _ in range(ATTEMPTS):
            try:
                clip, frames = self.reader.read(number, index, rng)
            except Unreadable as error:
                failures.append(str(error))
                index = int(rng.integers(len(source)))
                continue
            if self.captions and not clip.captions:
                raise InputError(
                    f"clip {clip.id!r} has no caption to learn from; of questions alone learn with "
                    "objectives.question_answering, every other objective 0"
                )
            caption = clip.captions[rng.integers(len(clip.captions))] if clip.captions else ""
            tokens, lengths = self.tokenizer([caption])
            return {
                "video": frames,
                "tokens": tokens[0],
                "lengths": lengths[0],
                "clip": identity(clip.id, self._dataset(number)),
                "ids": [clip.id],
                "failures": failures,
                **(self._asked(clip, rng) if self.questions else {}),
            }
        raise InputError(f"{ATTEMPTS} clips in a row cannot be decoded; the last: {failures[-1]}")

    def _dataset(self, number: int) -> str:
        """A source's data set, as `identity` takes it."""
        return "" if not self.datasets or self.datasets[number] == self.datasets[0] else self.datasets[number]

    def _asked(self, clip: schema.ClipRecord, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The tokens of different questions with their answers'; where the clip has too few, nothing to learn from."""
        known = [question for question in clip.questions if question.type not in self.without]
        chosen = _types_in_turns([known[i] for i in rng.permutation(len(known))])[: self.questions]
        padded = chosen + [schema.Question("", "")] * (self.questions - len(chosen))
        tokens, lengths, starts = self.tokenizer.pairs([q.question for q in padded], [q.answer for q in padded])
        lengths[len(chosen) :] = starts[len(chosen) :]
        return {"question_tokens": tokens, "question_lengths": lengths, "answer_starts": starts}


def _types_in_turns(questions: Sequence[schema.Question]) -> list[schema.Question]:
    """The questions, first one of each type, then a second of each: many of one type do not crowd out the others."""
    seen = collections.Counter()
    turns = []
    for question in questions:
        turns.append(seen[question.type])
        seen[question.type] += 1
    return [question for _, question in sorted(zip(turns, questions, strict=True), key=lambda pair: pair[0])]


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
    """An endless iterator over training batches, from number `first` on; to be closed when done with.

    Args:
      sources: data sources of the schema, each with its weight in the mixture.
      batch_size: clips of a batch over all processes; this process gets `batch_size / processes` of them.
      workers: processes that decode, at most; 0 decodes in threads of this one.
      memory: what batches that are made ahead may take.
      questions: how many come along with each clip, of other types than those in `without`.
      captions: whether captions are learned from; without, a clip may have none.
      datasets: the data set of each source (`mixtures.dataset_names`): equal ids in two of them are two clips. Empty:
        all sources are of one.

    Yields:
      `video` uint8 `[b, T, S, S, 3]`, `tokens` int32 `[b, L]`, `lengths` int32 `[b]`, `clip` int32 `[b]` (equal
      for equal clips), `ids` (the clips') and `failures` (strings: what could not be decoded and was replaced); with
      `questions` also `question_tokens` int32 `[b, Q, L]`, `question_lengths` and `answer_starts` int32 `[b, Q]`, equal
      where a clip has no further question.

    Raises:
      InputError: a source is empty, the batch does not divide over the processes, or the memory is too little.
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

    size = batch_size // processes
    prefetch = plan_prefetch(memory, batch=size, frame_bytes=frames.nbytes, workers=workers)

    def make(reader: ClipReader) -> Pieces:
        read = ReadForTraining(reader, tokenizer, questions, without, captions, tuple(datasets))
        clips = mixed.random_map(read, seed=seed)
        return Pieces(clips, size, prefetch.piece, first * processes + process, processes)

    return Batches(make, ClipReader(tuple(sources), frames), size, prefetch)


def _numbered(number: int, index: int) -> tuple[int, int]:
    return number, index


@dataclasses.dataclass(frozen=True)
class ReadForEvaluation:
    """Reads an index of a source: centre frames; a clip that cannot be decoded is black and not `valid`."""

    reader: ClipReader

    def __call__(self, index: int) -> dict[str, Any]:
        try:
            frames, failures = self.reader.read(0, index, None)[1], []
        except Unreadable as error:
            asked = self.reader.frames
            frames = np.zeros((asked.num_frames, asked.size, asked.size, 3), np.uint8)
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
    """Every clip of a source once, in order, in batches of one size; to be closed when done with.

    Args:
      process, processes: each of several gets its share of the batches, which are the same whatever their number, and
        so is what is computed of them, to the bit.
      workers, memory: as of `training_batches`.

    Yields:
      `video` uint8 `[b, T, S, S, 3]`, `index` int32 `[b]` (-1 for padding), `valid` bool `[b]` and `failures`.

    Raises:
      InputError: the memory is too little.
    """
    indices = grain.MapDataset.range(len(source))
    prefetch = plan_prefetch(memory, batch=batch_size, frame_bytes=frames.nbytes, workers=workers)

    def make(reader: ClipReader) -> Pieces:
        return Pieces(indices.map(ReadForEvaluation(reader)), batch_size, prefetch.piece, process, processes)

    return Batches(make, ClipReader((source,), frames), batch_size, prefetch)


@dataclasses.dataclass
class FailureCount:
    """Counts the clips that could not be decoded, names each once in the log, and stops over a share.

    Attributes:
      limit: the largest share of failed clips, of the clips seen (of `whole` where that is more, and of 1,000 where
        it is less).
      seen, failed: clips so far; saved with a checkpoint.
      whole: clips that there are in all, where they are known before.
      last: how the last failure was told.
    """

    limit: float
    seen: int = 0
    failed: int = 0
    whole: int = 0
    last: str = ""
    named: set[str] = dataclasses.field(default_factory=set)
    _joined: tuple[int, int] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self._joined = (self.seen, self.failed)

    def update(self, clips: int, failures: Sequence[str]) -> None:
        """Counts a batch.

        Raises:
          InputError: more than `limit` of the clips failed.
        """
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
        """Adds what other processes have counted since the last time, or since the start; judges all of it.

        Args:
          gathered: of a value of this process, those of all.

        Raises:
          InputError: as `update`, in all processes alike.
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
