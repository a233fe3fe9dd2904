"""The record of steps, each of which is dispatched while the one before runs."""

import pytest

from vlab_jax.runtime import metrics as recording
from vlab_jax.runtime.metrics import MetricWriter, ProgressBar, StepRecord, read_metrics
from vlab_jax.runtime.profiling import StepCost


class Clock:
    """A clock that only moves when something waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)


class Device:
    """Computes one step after the other, each for the same time; a loss is there when its step is done."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds, self.free = clock, seconds, clock.now

    def step(self) -> "Loss":
        self.free = max(self.free, self.clock.now) + self.seconds
        return Loss(self.clock, self.free)


COST = StepCost(clips=48, frames=48 * 8, flops=4e12, peak=1e12)


def unwatched(*_: object) -> None:
    pass


class Loss:
    """Waits, when it is read, until it is there."""

    def __init__(self, clock: Clock, there: float) -> None:
        self.clock, self.there = clock, there

    def __float__(self) -> float:
        self.clock.now = max(self.clock.now, self.there)
        return 1.0


@pytest.mark.parametrize(("input_seconds", "rate", "share"), [(0.0, 4.8, 0.0), (4.0, 4.8, 0.4), (40.0, 1.2, 1.0)])
def test_speed_counts_each_second_once_though_steps_are_read_one_behind(
    tmp_path, monkeypatch, input_seconds, rate, share
):
    clock = Clock()
    monkeypatch.setattr(recording, "time", clock)
    device = Device(clock, seconds=10.0)
    with MetricWriter(tmp_path) as writer, ProgressBar("adapt", 40, shown=False) as bar:
        record = StepRecord(writer, bar, "adapt", 0, 10, lambda step: 1.0, COST, unwatched)
        for step in range(1, 41):
            started = clock.now
            clock.now += input_seconds
            record.add(step, {"loss": device.step()}, started, clock.now, [])
        record.flush()
    last = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row][-1]
    assert last["clips_per_second"] == pytest.approx(rate, rel=0.05)
    assert last["input_wait_share"] == pytest.approx(share, abs=0.05)
    assert last["frames_per_second"] == pytest.approx(8 * last["clips_per_second"])
    assert last["step_seconds"] == pytest.approx(48 / last["clips_per_second"])
    assert last["mfu"] == pytest.approx(4e12 / last["step_seconds"] / 1e12)


def test_without_a_known_peak_there_is_no_utilisation(tmp_path):
    with MetricWriter(tmp_path) as writer, ProgressBar("adapt", 1, shown=False) as bar:
        record = StepRecord(writer, bar, "adapt", 0, 1, lambda step: 1.0, COST._replace(peak=None), unwatched)
        record.add(1, {"loss": 1.0}, 0.0, 0.0, [])
        record.flush()
    (last,) = read_metrics(tmp_path / "metrics.jsonl")
    assert "mfu" not in last and last["model_flops_per_step"] == 4e12


def test_time_between_two_steps_counts_in_no_figure(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(recording, "time", clock)
    device = Device(clock, seconds=2.0)
    with MetricWriter(tmp_path) as writer, ProgressBar("adapt", 2, shown=False) as bar:
        record = StepRecord(writer, bar, "adapt", 0, 2, lambda step: 1.0, COST, unwatched)
        for step in (1, 2):
            record.add(step, {"loss": device.step()}, clock.now, clock.now, [])
            record.flush()
            clock.now += 100.0  # as of an evaluation
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["step_seconds"] == pytest.approx(2.0) and row["input_wait_share"] == 0.0
