"""Metrics of a run: their record on disk, a progress bar, and the speed of training.

`metrics.jsonl` is the record: one JSON object a line, flushed at once, with the keys `step` (global over all stages),
`stage` and `time`, and the metrics beside them. TensorBoard events show the same figures live.
"""

import collections
import contextlib
import dataclasses
import json
import math
import operator
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsFloat

import numpy as np
import tqdm

from vlab_jax.errors import InputError
from vlab_jax.runtime.disk import write_text, writing
from vlab_jax.runtime.profiling import StepCost

METRICS_FILE = "metrics.jsonl"
_RESERVED = frozenset({"step", "stage", "time"})
_FLUSH_SECONDS = 5.0


def json_safe(value: SupportsFloat) -> float | None:
    """The number, or None (`null`) for NaN and the infinities, which JSON lacks."""
    number = float(value)
    return number if math.isfinite(number) else None


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`: a mapping for each line, in which metrics that were not finite are None. A last line
    that a kill cut off is left out.

    Raises:
      InputError: a line other than the last is not a JSON object with an integer `step`.
    """
    records = []
    *finished, _ = pathlib.Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(finished, start=1):
        if line.strip():
            try:
                record = json.loads(line)
                operator.index(record["step"])
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(
                    f"{os.fspath(path)}, line {number}: not a record of metrics; remove it, or move the file away"
                ) from error
            records.append(record)
    return records


class MetricWriter(contextlib.AbstractContextManager):
    """Appends metrics to `<workdir>/metrics.jsonl` and to TensorBoard events in `<workdir>/tensorboard`.

    When `write` returns, the operating system has the line of `metrics.jsonl`, so that a killed run loses none; events
    follow within 5 seconds, at the next `write`. If the workdir has a record, call `truncate` with the restored step
    before the first `write`. Every method raises `CannotWrite` if the disk is full or read-only.

    Events are written by the calling thread: the `SummaryWriter` of tensorboardX has a thread for it, which dies when
    the disk is full, and then waits for that thread for ever.

    Args:
      active: whether anything is written, as by the first of several processes.
      clock: seconds since the epoch.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], *, active: bool = True, clock: Callable[[], float] = time.time
    ) -> None:
        self.path, self._clock, self._active = pathlib.Path(workdir) / METRICS_FILE, clock, active
        self._folder = self.path.parent / "tensorboard"
        self._events: Any = None  # tensorboardX's `EventsWriter`
        self._purge_step: int | None = None
        self._flushed = 0.0
        if active:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, SupportsFloat], *, stage: str | None = None) -> None:
        """Records `metrics` at a global `step`; values that are not finite become `null`. Raises `ValueError` if a
        metric is called `step`, `stage` or `time`."""
        if not self._active:
            return
        if clash := _RESERVED.intersection(metrics):
            raise ValueError(f"a metric cannot be called {sorted(clash)[0]!r}: every line has that key")
        now = self._clock()
        values = {name: json_safe(value) for name, value in metrics.items()}
        record = {**values, "step": int(step), "stage": stage, "time": now}
        with writing(self.path):
            self._file.write(json.dumps(record, sort_keys=True, allow_nan=False) + "\n")
            self._file.flush()
        with writing(self._folder):
            self._write_events(int(step), values, now)

    def _write_events(self, step: int, values: Mapping[str, float | None], now: float) -> None:
        # Here, because importing it imports PyTorch where that is installed, and only training writes events.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        if self._events is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Two runs that start within one second would otherwise share, and overwrite, one event file.
            self._events = EventsWriter(str(self._folder / "events"), filename_suffix=f".{time.time_ns()}")
            if self._purge_step is not None:
                started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self._events.write_event(event_pb2.Event(wall_time=now, step=self._purge_step, session_log=started))
        for name, value in values.items():
            if value is not None:
                scalar = summary_pb2.Summary.Value(tag=name.replace("@", "_"), simple_value=value)
                summary = summary_pb2.Summary(value=[scalar])
                self._events.write_event(event_pb2.Event(wall_time=now, step=step, summary=summary))
        if now - self._flushed >= _FLUSH_SECONDS:
            self._flushed = now
            self._events.flush()

    def truncate(self, step: int) -> None:
        """Removes everything after a global `step`, which a run resumed from there records again; raises as
        `read_metrics`. TensorBoard keeps its old files; a new one makes it hide the later steps."""
        if not self._active:
            return
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        write_text(self.path, "".join(json.dumps(record, sort_keys=True) + "\n" for record in kept))
        self.close()
        with writing(self.path):
            self._file = self.path.open("a", encoding="utf-8")
        self._purge_step = step + 1

    def close(self) -> None:
        """Writes out what is pending; a second call does nothing."""
        if self._active:
            with writing(self.path):
                self._file.close()
        events, self._events = self._events, None
        if events is not None:
            with writing(self._folder):
                events.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_LINE = "{desc} {n_fmt}/{total_fmt} ({percentage:.0f} %){postfix} [{elapsed}<{remaining}]"


class _Lines:
    """A file for tqdm that turns each redrawn bar into a line, for logs and pipes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=self._stream)

    def flush(self) -> None:
        self._stream.flush()


class ProgressBar(contextlib.AbstractContextManager):
    """The progress of a stage or an evaluation: a bar in a terminal; in a file or a pipe, a line each `interval`
    seconds at most. Of the `total` steps or clips, `initial` were done before (in a resumed run)."""

    def __init__(
        self, name: str, total: int, *, initial: int = 0, shown: bool = True, stream: Any = None, interval: float = 10.0
    ) -> None:
        stream = stream or sys.stderr
        terminal = stream.isatty()
        self._bar = tqdm.tqdm(
            total=total,
            initial=initial,
            desc=name,
            disable=not shown,
            file=stream if terminal else _Lines(stream),
            dynamic_ncols=terminal,
            mininterval=0.2 if terminal else interval,
            miniters=1,
            bar_format=_BAR if terminal else _LINE,
        )

    def update(self, done: int, figures: str = "") -> None:
        """Shows that `done` of the total are done; `figures` are shown beside."""
        self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *exception: object) -> None:
        self._bar.close()


@dataclasses.dataclass
class StepRecord:
    """Collects the metrics of each step of a stage, and writes their means every `log_every` steps.

    Metrics are read one step late, so that the accelerator never waits for the host. Speed and the share of time spent
    waiting for input are of the last 50 steps; time between two steps (an evaluation, a checkpoint) counts in neither.
    """

    writer: MetricWriter
    progress: ProgressBar
    stage: str
    offset: int  # global steps before this stage
    log_every: int
    schedule: Callable[[int], Any]  # (step of the stage) → the factor of the peak learning rate
    cost: StepCost  # of each step
    # Takes each step, its loss, whether it was finite, and the ids of its clips (`StepMonitor.check`).
    watch: Callable[[int, float, bool, Sequence[str]], None]

    def __post_init__(self) -> None:
        self._values: dict[str, list[float]] = collections.defaultdict(list)
        self._pending: tuple[int, Mapping[str, Any], float, float, Sequence[str]] | None = None
        self._done = 0.0  # when the metrics of the step before were there
        self._seconds: collections.deque[tuple[float, float]] = collections.deque(maxlen=50)  # of waiting, of all

    def add(self, step: int, metrics: Mapping[str, Any], started: float, ready: float, ids: Sequence[str]) -> None:
        """Adds the metrics of a step (counted from 1 in the stage), and reads those of the step before; `started` and
        `ready` are `time.monotonic()` before and after waiting for the batch, whose clips have these ids."""
        self.flush()
        self._pending = (step, metrics, started, ready, ids)

    def flush(self) -> None:
        """Reads the metrics that are still pending; raises `RunStopped` where `watch` does."""
        if self._pending is None:
            return
        step, metrics, started, ready, ids = self._pending
        self._pending = None
        values = {name: float(value) for name, value in metrics.items()}
        # A step is dispatched while the one before still runs: its own time begins where that one's ends.
        begun, done = max(started, self._done), time.monotonic()
        self._seconds.append((min(ready - started, done - begun), done - begun))
        self._done = done
        self.watch(step, values["loss"], not values.get("skipped", 0.0), ids)
        for name, value in values.items():
            self._values[name].append(value)
        speed = self._speed()
        utilisation = f", MFU {100 * speed['mfu']:.1f} %" if "mfu" in speed else ""
        self.progress.update(step, f"loss {values['loss']:.4g}, {speed['clips_per_second']:.1f} clips/s{utilisation}")
        if step % self.log_every == 0:
            means = {name: float(np.mean(values)) for name, values in self._values.items()}
            self._values.clear()
            means["learning_rate_factor"] = float(self.schedule(step - 1))
            self.writer.write(self.offset + step, means | speed, stage=self.stage)

    def _speed(self) -> dict[str, float]:
        """Figures per second, of all devices together, and `mfu`, the share of their peak that model FLOPs take."""
        waiting, seconds = (sum(column) for column in zip(*self._seconds, strict=True))
        steps = len(self._seconds) / seconds if seconds > 0 else 0.0  # per second
        figures = {
            "clips_per_second": steps * self.cost.clips,
            "frames_per_second": steps * self.cost.frames,
            "step_seconds": 1 / steps if steps else 0.0,
            "input_wait_share": waiting / seconds if seconds > 0 else 0.0,
            "model_flops_per_step": self.cost.flops,
        }
        return figures | ({"mfu": steps * self.cost.flops / self.cost.peak} if self.cost.peak else {})
