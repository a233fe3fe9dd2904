"""A data set is built by an Apache Beam pipeline: on one machine, or on Dataflow, Flink or Spark, as its options say.

The pipeline is short, because shards need nothing of each other (`shard_work.py`): no media pass between workers, as
they would through TFDS's own Beam writer, which groups all records by shard.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import sys
import threading
from collections.abc import Iterator

from tqdm import tqdm

from vlab_jax.datasets import clip_builder
from vlab_jax.datasets.clip_builder import ClipBuilder
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.errors import InputError, RunStopped


@dataclasses.dataclass(frozen=True)
class BeamOptions:
    """How a pipeline runs.

    Attributes:
      flags: of Beam and its runner, as in `--runner=FlinkRunner`; without a runner, Beam's own on this machine.
      clips_per_shard: clips of a file, and of a piece of work: what one worker does at a time.
      paths: `here=there`, where workers see files by other paths than this machine: paths that begin with `here`
        begin with `there` for them, as in `/mnt/bucket=gs://bucket`. Empty: paths are the same.
    """

    flags: tuple[str, ...] = ()
    clips_per_shard: int = 1000
    paths: str = ""

    def __post_init__(self) -> None:
        if self.clips_per_shard < 1:
            raise InputError(f"clips_per_shard is {self.clips_per_shard}; it must be at least 1")
        here, mark, there = self.paths.partition("=")
        if self.paths and not (mark and there and os.path.isabs(here)):
            raise InputError(f"paths is {self.paths!r}; it must be here=there, as in /mnt/bucket=gs://bucket")

    def seen(self, path: str) -> str:
        """What a path of this machine is to a worker."""
        here, _, there = self.paths.partition("=")
        here, there = here.rstrip("/"), there.rstrip("/")
        return there + path.removeprefix(here) if here and path.startswith(f"{here}/") else path


def build(builder: ClipBuilder, files: pathlib.Path, options: BuildOptions, beam: BeamOptions) -> None:
    """Writes the data set into the directory `files`, shard by shard; ended early, it goes on from there.

    Raises:
      InputError: Beam is not installed, or no clip has media that can be decoded.
      RunStopped: the pipeline failed.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise InputError(f"--beam needs Apache Beam ({error}): pip install 'apache-beam>=2.77,<3'") from error
    logging.info("%s: writing the lists of clips", builder.title(options))
    pieces = clip_builder.plan(builder, files, beam.clips_per_shard, beam.seen)
    everything = [piece for some in pieces.values() for piece in some]
    try:
        with (
            _progress(builder.title(options), files / clip_builder.WORK, len(everything)),
            apache_beam.Pipeline(options=PipelineOptions(list(beam.flags))) as pipeline,
        ):
            _ = (
                pipeline
                | "Pieces" >> apache_beam.Create(everything)
                | "Spread" >> apache_beam.Reshuffle()
                | "Store" >> apache_beam.Map(functools.partial(_do, options=options))
            )
    except Exception as error:  # each runner has its own
        logging.exception("the pipeline failed")
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RunStopped(f"the pipeline failed: {reason}; what is done is kept, the same command goes on") from error
    clip_builder.finish(builder, files, options, pieces)


def _do(piece: clip_builder.Piece, options: BuildOptions) -> None:
    """Does a piece of the work, on a worker; the runner's page shows the counts."""
    from apache_beam.metrics import Metrics

    said = clip_builder.do(piece, options)
    Metrics.counter("vlab_jax", "clips").inc(said["clips"])
    Metrics.counter("vlab_jax", "clips without media").inc(len(said["failures"]))
    Metrics.counter("vlab_jax", "bytes").inc(said["bytes"])


@contextlib.contextmanager
def _progress(title: str, work: pathlib.Path, shards: int) -> Iterator[None]:
    """A bar over the shards that are done, whoever does them: their files are counted."""
    seconds = 0.5 if sys.stderr.isatty() else 10.0
    ended = threading.Event()
    with tqdm(total=shards, desc=title, unit=" shards", mininterval=seconds) as bar:

        def show() -> None:
            bar.update(len(list(work.glob("*.json"))) - bar.n)

        def watch() -> None:
            while not ended.wait(seconds):
                show()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            show()
