"""Batches of clips: TFDS data sources, shuffled and mixed, decoded in worker processes.

Which clips a training batch holds, which frames, which of their captions: all of it is a function of (seed, number of
the batch). A run that resumes asks for the batches from where it stopped and gets what it would have got.

Dimensions: `b` clips of this process, `T` frames, `S` pixels, `L` text tokens.
"""

import collections
import dataclasses
import functools
import gc
import logging
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from vlab_jax.data import left, schema
from vlab_jax.data.in_hand import InHand, guilty
from vlab_jax.data.mixtures import identity
from vlab_jax.data.patience import Patient
from vlab_jax.data.reader import FrameOptions, Reader, Unreadable
from vlab_jax.data.tokenizer import Tokenizer
from vlab_jax.data.workers import begin_worker
from vlab_jax.errors import CannotRead, InputError, RunStopped

Batch = dict[str, Any]
ATTEMPTS = 10  # clips tried in place of one that cannot be decoded
MOST_DEATHS = 3  # of worker processes over one batch


@dataclasses.dataclass(frozen=True)
class ReadForTraining:
    """Reads an element (number of the source, index in it): random frames, one random caption, its tokens.

    A clip that cannot be decoded is replaced by another of the same source, drawn from the element's generator, and
    its name and reason are handed on in `failures`. So many `questions` come along, of other types than those in
    `without`, one of each type before a second of any. Without `captions`, nothing is learned from those, and a clip
    may have none. `datasets` names each source's data set; empty: all are of one.
    """

    reader: Reader
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

    def _asked(self, clip: schema.Clip, rng: np.random.Generator) -> dict[str, np.ndarray]:
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


def stack(elements: Sequence[Mapping[str, Any]]) -> Batch:
    """Elements to a batch: arrays are stacked, lists (of failures, of ids) are joined."""
    lists = [key for key in elements[0] if isinstance(elements[0][key], list)]
    batch = {key: np.stack([e[key] for e in elements]) for key in elements[0] if key not in lists}
    return batch | {key: [each for e in elements for each in e[key]] for key in lists}


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
    questions: int = 0,
    without: tuple[str, ...] = (),
    captions: bool = True,
    datasets: Sequence[str] = (),
) -> "Batches":
    """An endless iterator over training batches, from number `first` on; to be closed when done with.

    Args:
      sources: data sources of the schema, each with its weight in the mixture.
      batch_size: clips of a batch over all processes; this process gets `batch_size / processes` of them.
      workers: processes that decode; 0 decodes in threads of this one.
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
      InputError: a source is empty, or the batch does not divide over the processes.
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

    def make(reader: Reader) -> grain.MapDataset:
        read = ReadForTraining(reader, tokenizer, questions, without, captions, tuple(datasets))
        # Without drop_remainder, Grain computes the number of batches in floats, and batches of 1 overflow.
        batches = mixed.random_map(read, seed=seed).batch(batch_size // processes, drop_remainder=True, batch_fn=stack)
        return batches[first * processes + process :: processes]

    return Batches(make, Reader(tuple(sources), frames), workers)


def _numbered(number: int, index: int) -> tuple[int, int]:
    return number, index


@dataclasses.dataclass(frozen=True)
class ReadForEvaluation:
    """Reads an index of a source: centre frames; a clip that cannot be decoded is black and not `valid`."""

    reader: Reader

    def __call__(self, index: int) -> dict[str, Any]:
        try:
            frames, failures = self.reader.read(0, index, None)[1], []
        except Unreadable as error:
            asked = self.reader.frames
            frames = np.zeros((asked.num_frames, asked.size, asked.size, 3), np.uint8)
            failures = [str(error)]
        return {"video": frames, "index": np.int32(index), "valid": not failures, "failures": failures}


@dataclasses.dataclass(frozen=True)
class Pad:
    """Stacks elements and pads the batch to its full size with clips that are not `valid`."""

    batch_size: int

    def __call__(self, elements: Sequence[Mapping[str, Any]]) -> Batch:
        missing = self.batch_size - len(elements)
        empty = {**elements[-1], "valid": False, "index": np.int32(-1), "failures": []}
        return stack([*elements, *[empty] * missing])


def evaluation_batches(
    source: Sequence,
    frames: FrameOptions,
    *,
    batch_size: int,
    workers: int = 0,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """Every clip of a source once, in order, in batches of one size; of several processes each gets its share of them.

    The batches are the same whatever the number of processes: so is, to the bit, what is computed of them.

    Yields:
      `video` uint8 `[b, T, S, S, 3]`, `index` int32 `[b]` (-1 for padding), `valid` bool `[b]` and `failures`.
    """
    indices = grain.MapDataset.range(len(source))

    def make(reader: Reader) -> grain.MapDataset:
        read = indices.map(ReadForEvaluation(reader))
        batches = read.batch(batch_size, drop_remainder=False, batch_fn=Pad(batch_size))
        return batches[process::processes]

    return Batches(make, Reader((source,), frames), workers)


class Batches(Iterator[Batch]):
    """Batches made ahead of time, by threads of this process or by worker processes.

    A worker process that dies is replaced, and the batches that it had not delivered are made anew: they are the same,
    unless the clip that it was at is to blame, by a crash of the decoder or by taking too long; that one is a clip that
    cannot be decoded from then on. Closing ends the worker processes, and so does leaving the `with` block. Without
    that they end when it is no longer referred to, which an exception on its way up can put off.

    Args:
      make: the batches, read by a reader.
      reader: of the data sources; patient ones are shared by those who read.
      workers: processes that make batches; 0: threads of this one.

    Raises, from `next`:
      InputError, CannotRead: as the transformations raise them, in a worker process too.
      RunStopped: worker processes die again and again, over the same batch, and no clip is to blame.
    """

    def __init__(self, make: Callable[[Reader], grain.MapDataset], reader: Reader, workers: int) -> None:
        self._folder = left.folder()
        shared = pathlib.Path(self._folder.name)
        self._tag = left.tag_of(self._folder.name)
        if workers:
            (shared / "in_hand").mkdir()
            in_hand = InHand(str(shared / "in_hand"), reader.frames.limits.clock_seconds)
            reader = dataclasses.replace(reader, in_hand=in_hand)
        sources = tuple(each.within(shared) if isinstance(each, Patient) else each for each in reader.sources)
        self._make, self._reader, self._workers = make, dataclasses.replace(reader, sources=sources), workers
        self._delivered = self._deaths = 0
        self._iterator: grain.DatasetIterator | None = None
        self._start()

    def _start(self) -> None:
        batches = self._make(self._reader)[self._delivered :]
        self._iterator = iter(_in_background(batches, self._workers, self._tag))

    def __next__(self) -> Batch:
        while self._iterator is not None:
            try:
                batch = next(self._iterator)
            except (InputError, CannotRead) as error:
                raise type(error)(str(error)) from None  # without Grain's note on tracebacks
            except RuntimeError as error:
                if "Worker process was terminated" not in str(error):
                    raise
                self._replace_workers(error)
                continue
            self._delivered, self._deaths = self._delivered + 1, 0
            return batch
        raise StopIteration  # closed

    def _end_workers(self) -> None:
        iterator, self._iterator = self._iterator, None
        if iterator is None:
            return
        iterator.close()
        if self._workers:
            del iterator
            gc.collect()  # it refers to itself, and holds batches in shared memory
            left.remove_undelivered(self._tag)

    def _replace_workers(self, error: RuntimeError) -> None:
        """Begins anew behind the last batch that was delivered, without the clips that are to blame."""
        self._end_workers()
        told = re.search(r"exit code (-?\d+)", str(error))
        code = int(told.group(1)) if told else None
        reader = self._reader
        found = guilty(reader.in_hand.left(), code, reader.again, reader.in_hand.seconds)
        if found:
            self._reader = dataclasses.replace(reader, lost={**reader.lost, **found})
        else:
            self._count_death("unknown" if code is None else str(code), error)
        self._start()

    def _count_death(self, code: str, error: RuntimeError) -> None:
        ended = f"a worker process that decodes was ended with exit code {code}"
        self._deaths += 1
        if self._deaths > MOST_DEATHS:
            raise RunStopped(
                f"{ended}, {self._deaths} times over the same batch, by the system if it ran out of memory; run again, "
                "with fewer, as in --config.data.workers=1"
            ) from error
        logging.warning("%s; others make its batches anew", ended)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends threads and worker processes, those too that wait for their data; a second time, does nothing."""
        self._folder.cleanup()
        self._end_workers()


def _in_background(batches: grain.MapDataset, workers: int, tag: str) -> grain.IterDataset:
    """Two batches ahead: by threads of this process, or by worker processes with one reading thread each.

    `tag` is in the names of the memory that the worker processes share.
    """
    if workers == 0:
        return batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain asks for its own flags; a program without a command line has none
    quiet = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return batches.to_iter_dataset(quiet).mp_prefetch(options, functools.partial(begin_worker, tag))


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
