"""What a run says of itself: recorded metrics, a progress bar, and how fast clips go through.

`metrics.jsonl` is the record: one JSON object a line, flushed at once, with the keys `step` (global over all
stages), `stage` and `time`, and the metrics beside them. TensorBoard events show the same figures live.
"""

import collections
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, SupportsFloat, runtime_checkable

import numpy as np
import tqdm
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from vlab_jax.errors import InputError
from vlab_jax.runtime.disk import writing

METRICS_FILE = "metrics.jsonl"
_RESERVED = frozenset({"step", "stage", "time"})
_FLUSH_SECONDS = 5.0


def json_safe(value: SupportsFloat) -> float | None:
    """A number that JSON can carry: NaN and the infinities, which it cannot, become None (`null`)."""
    number = float(value)
    return number if math.isfinite(number) else None


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`; a last line that a kill cut off is left out.

    Returns:
        One mapping a line, in file order; metrics that were not finite are None.

    Raises:
        InputError: a line other than the last is not a JSON object with an integer `step`.
    """
    lines = pathlib.Path(path).read_bytes().split(b"\n")
    # What follows the last newline is either nothing or a line that was never finished.
    finished = lines[:-1]
    return [_parse(line, number, path) for number, line in enumerate(finished, start=1) if line.strip()]


def _parse(line: bytes, number: int, path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise InputError(f"{os.fspath(path)}, line {number}: not a record of metrics; remove it, or move the file away")
    return record


class StepCost(NamedTuple):
    """What one step goes through: clips, frames of all of them, model FLOPs (`models.flops.step_flops`), and the FLOP/s
    that all devices together can do (None: not known)."""

    clips: int
    frames: int
    flops: float
    peak: float | None


class MetricWriter:
    """Appends metrics to `<workdir>/metrics.jsonl` and to TensorBoard events in `<workdir>/tensorboard`.

    A line of `metrics.jsonl` is with the operating system when `write` returns, so killing the run loses
    none; TensorBoard events follow within 5 seconds, at the next `write`. One process of a run writes; the others make
    no writer. To resume, call `truncate` with the restored step before the first `write`.

    Args:
        workdir: the run's directory; created if missing.
        clock: seconds since the epoch.

    Raises, from every method:
        CannotWrite: the disk is full or read-only.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> None:
        self.path = pathlib.Path(workdir) / METRICS_FILE
        self._clock = clock
        self._events = _Events(self.path.parent / "tensorboard")
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _drop_unfinished_line(self.path)
            self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, SupportsFloat], *, stage: str | None = None) -> None:
        """Records `metrics` at a global `step`; values that are not finite become `null`.

        Raises:
            ValueError: a metric is called `step`, `stage` or `time`.
        """
        if clash := _RESERVED.intersection(metrics):
            raise ValueError(f"a metric cannot be called {sorted(clash)[0]!r}: every line has that key")
        now = self._clock()
        values = {name: json_safe(value) for name, value in metrics.items()}
        record = {**values, "step": int(step), "stage": stage, "time": now}
        with writing(self.path):
            self._file.write(json.dumps(record, sort_keys=True, allow_nan=False) + "\n")
            self._file.flush()
        self._events.write(int(step), values, now)

    def truncate(self, step: int) -> None:
        """Forgets everything after a global `step`: a run resumed from there would record it twice.

        The file is replaced in one move, so a kill leaves the old or the new one. TensorBoard keeps its old
        files and is told to hide the later steps.

        Raises:
            InputError: the file holds a line that is not a record of metrics.
        """
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        temporary = self.path.with_suffix(".jsonl.tmp")
        with writing(self.path):
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(record, sort_keys=True) + "\n" for record in kept)
                file.flush()
                os.fsync(file.fileno())
            self._file.close()
            os.replace(temporary, self.path)
            self._file = self.path.open("a", encoding="utf-8")
        self._events.restart(step + 1)

    def close(self) -> None:
        """Writes out what is pending; a second call does nothing."""
        with writing(self.path):
            self._file.close()
        self._events.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Events:
    """TensorBoard's event files. They are written by the thread that asks: tensorboardX's own writer has a thread that
    dies of a full disk, and then waits for it for ever."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._writer: EventsWriter | None = None
        self._purge_step: int | None = None
        self._flushed = 0.0

    def write(self, step: int, values: Mapping[str, float | None], now: float) -> None:
        """Adds the values of a step that are numbers, at `now`, in seconds since the epoch."""
        with writing(self._folder):
            writer = self._writer or self._begin(now)
            for name, value in values.items():
                if value is not None:
                    scalar = summary_pb2.Summary.Value(tag=name.replace("@", "_"), simple_value=value)
                    summary = summary_pb2.Summary(value=[scalar])
                    writer.write_event(event_pb2.Event(wall_time=now, step=step, summary=summary))
            if now - self._flushed >= _FLUSH_SECONDS:
                self._flushed = now
                writer.flush()

    def _begin(self, now: float) -> EventsWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        # Two runs that start within one second would otherwise share, and overwrite, one event file.
        self._writer = EventsWriter(str(self._folder / "events"), filename_suffix=f".{time.time_ns()}")
        if self._purge_step is not None:
            started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.write_event(event_pb2.Event(wall_time=now, step=self._purge_step, session_log=started))
        return self._writer

    def restart(self, purge_step: int) -> None:
        """Begins a new file that hides what the ones before say of `purge_step` and later."""
        self.close()
        self._purge_step = purge_step

    def close(self) -> None:
        """Writes out what is pending; a second call does nothing."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with writing(self._folder):
                writer.close()


class NoWriter:
    """In the place of a `MetricWriter`, in a process that records nothing."""

    def write(self, step: int, metrics: Mapping[str, SupportsFloat], *, stage: str | None = None) -> None:
        """Does nothing."""

    def truncate(self, step: int) -> None:
        """Does nothing."""

    def __enter__(self) -> "NoWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def _drop_unfinished_line(path: pathlib.Path) -> None:
    """Cuts off what follows the last newline, so that the next line does not run into it."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


@runtime_checkable
class Stream(Protocol):
    """Where progress is shown: standard error, an open text file, `io.StringIO`."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...

    def isatty(self) -> bool: ...


_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class ProgressBar:
    """A stage's progress: a bar in a terminal, a plain line now and then in a file or a pipe.

    Args:
        stage: the name shown in front.
        total_steps: steps of this stage.
        initial_step: steps of this stage done before (a resumed run); they do not count towards the speed.
        stream: where it is shown; standard error by default.
        interval: least seconds between two plain lines.
        clock: seconds, for plain lines; any origin.
    """

    def __init__(
        self,
        stage: str,
        total_steps: int,
        *,
        initial_step: int = 0,
        stream: Stream | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stage, self._total, self._step = stage, total_steps, initial_step
        self._stream = sys.stderr if stream is None else stream
        self._interval, self._clock = interval, clock
        self._first: tuple[int, float] | None = None
        self._last_line = -math.inf
        self._figures: dict[str, str] = {}
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm.tqdm(
                total=total_steps,
                initial=initial_step,
                desc=stage,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                mininterval=0.2,
                bar_format=_BAR,
            )

    def update(
        self,
        step: int,
        *,
        loss: SupportsFloat | None = None,
        clips_per_second: float | None = None,
        utilisation: float | None = None,
    ) -> None:
        """Says that `step` steps of the stage are done; a figure that is not given keeps its last value."""
        advance, self._step = step - self._step, step
        if loss is not None:
            self._figures["loss"] = f"loss {float(loss):.4g}"
        if clips_per_second is not None:
            self._figures["speed"] = f"{clips_per_second:.1f} clips/s"
        if utilisation is not None:
            self._figures["utilisation"] = f"MFU {100 * utilisation:.1f} %"
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._figures.values()), refresh=False)
            self._bar.update(advance)
        else:
            self._print_line_if_due()

    def message(self, text: str) -> None:
        """Prints a line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def _print_line_if_due(self) -> None:
        now = self._clock()
        if self._first is None:
            # The first step compiles: counting from its end keeps the estimate honest.
            self._first = (self._step, now)
        if self._step < self._total and now - self._last_line < self._interval:
            return
        self._last_line = now
        parts = [f"{self._stage} {self._step}/{self._total} ({100 * self._step / max(self._total, 1):.0f} %)"]
        parts += [*self._figures.values(), *self._time_left(now)]
        print(", ".join(parts), file=self._stream, flush=True)

    def _time_left(self, now: float) -> list[str]:
        first_step, first_time = self._first
        if self._step == first_step or self._step >= self._total:
            return []
        seconds = (now - first_time) / (self._step - first_step) * (self._total - self._step)
        return [f"{tqdm.tqdm.format_interval(seconds)} left"]

    def close(self) -> None:
        """Leaves the bar as it stands and frees the line below it."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Throughput:
    """Clips per second, and the share of time spent waiting for input, over the last `window` steps.

    It reads no clock: the loop takes three time stamps a step. What happens between two steps (an evaluation,
    a checkpoint) counts in neither figure.
    """

    def __init__(self, window: int = 50) -> None:
        if window < 1:
            raise ValueError(f"a window of {window} steps: it must hold at least one")
        self._steps: collections.deque[tuple[int, float, float]] = collections.deque(maxlen=window)

    def add(self, start: float, input_ready: float, end: float, clips: int) -> None:
        """Records one step.

        Args:
            start: seconds; the step begins to wait for its batch.
            input_ready: seconds; the batch is there.
            end: seconds; the step is done.
            clips: clips in the batch.

        Raises:
            ValueError: the time stamps run backwards.
        """
        if not start <= input_ready <= end:
            raise ValueError(f"time stamps run backwards: {start}, {input_ready}, {end}")
        self._steps.append((clips, input_ready - start, end - start))

    @property
    def clips_per_second(self) -> float:
        """Clips per second; 0 before the first step."""
        seconds = sum(step[2] for step in self._steps)
        return sum(step[0] for step in self._steps) / seconds if seconds > 0 else 0.0

    @property
    def input_wait_share(self) -> float:
        """Share of time, 0 to 1, spent waiting for input; 0 before the first step."""
        seconds = sum(step[2] for step in self._steps)
        return sum(step[1] for step in self._steps) / seconds if seconds > 0 else 0.0


# FOLDED vlab_jax/runtime/metrics.py: The metrics of a stage's steps, read one step behind, so that the accelerator
# never waits for the host.


class StepRecord:
    """Takes each step's metrics, and writes their means every `log_every` steps.

    Args:
      stage: its name.
      offset: global steps before this stage.
      learning_rate: the factor of the peak learning rate at a step of the stage.
      cost: of each step.
      watch: takes each step, its loss, whether it was finite, and the ids of its clips (`Anomalies.watch`).
    """

    def __init__(
        self,
        stage: str,
        offset: int,
        writer: MetricWriter,
        progress: ProgressBar,
        log_every: int,
        learning_rate: Any,
        cost: StepCost,
        watch: Callable[[int, float, bool, Sequence[str]], None],
    ) -> None:
        self._stage, self._offset, self._writer, self._progress = stage, offset, writer, progress
        self._log_every, self._learning_rate, self._watch = log_every, learning_rate, watch
        self._throughput, self._cost = Throughput(), cost
        self._window: dict[str, list[float]] = collections.defaultdict(list)
        self._pending: tuple[int, Mapping[str, Any], float, float, Sequence[str]] | None = None
        self._done = 0.0  # when the step before was seen to be done

    def add(self, step: int, metrics: Mapping[str, Any], started: float, ready: float, ids: Sequence[str]) -> None:
        """Takes the metrics of a step (counted from 1 in the stage); reads those of the step before.

        `started` and `ready` are `time.monotonic()` before and after waiting for the batch, `ids` are its clips'.
        """
        self.flush()
        self._pending = (step, metrics, started, ready, ids)

    def flush(self) -> None:
        """Reads what is pending.

        Raises:
          RunStopped: too many steps in a row were not finite.
        """
        if self._pending is None:
            return
        step, metrics, started, ready, ids = self._pending
        self._pending = None
        values = {name: float(value) for name, value in metrics.items()}
        # A step is handed over while the one before still runs: its own time begins where that one's ends.
        begun, done = max(started, self._done), time.monotonic()
        self._throughput.add(begun, min(begun + ready - started, done), done, self._cost.clips)
        self._done = done
        self._watch(step, values["loss"], not values.get("skipped", 0.0), ids)
        for name, value in values.items():
            self._window[name].append(value)
        speed = self._throughput.clips_per_second
        self._progress.update(step, loss=values["loss"], clips_per_second=speed, utilisation=self._utilisation())
        if step % self._log_every == 0:
            self._write(step)

    def _write(self, step: int) -> None:
        means = {name: float(np.mean(values)) for name, values in self._window.items()}
        self._window.clear()
        means["learning_rate_factor"] = float(self._learning_rate(step - 1))
        means |= self._speed()
        self._writer.write(self._offset + step, means, stage=self._stage)

    def _speed(self) -> dict[str, float]:
        """Per-second figures are of all devices together; `mfu` is the share of their peak that model FLOPs take."""
        cost, speed = self._cost, self._throughput.clips_per_second
        figures = {
            "clips_per_second": speed,
            "frames_per_second": speed * cost.frames / cost.clips,
            "step_seconds": cost.clips / speed if speed else 0.0,
            "input_wait_share": self._throughput.input_wait_share,
            "model_flops_per_step": cost.flops,
        }
        utilisation = self._utilisation()
        return figures if utilisation is None else {**figures, "mfu": utilisation}

    def _utilisation(self) -> float | None:
        if self._cost.peak is None:
            return None
        return self._throughput.clips_per_second / self._cost.clips * self._cost.flops / self._cost.peak
