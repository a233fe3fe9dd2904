"""The metrics of a stage's steps, read one step behind, so that the accelerator never waits for the host."""

import collections
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlab_jax.runtime.meters import MetricWriter, Progress, Throughput
from vlab_jax.training.step_cost import StepCost


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
        progress: Progress,
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
