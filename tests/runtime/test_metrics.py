"""Metrics survive kills and resumption with every step once; the progress line stays quiet in a file."""

import io
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vlab_jax.errors import InputError
from vlab_jax.runtime.metrics import MetricWriter, ProgressBar, Throughput, json_safe, read_metrics


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def events(workdir) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(str(workdir / "tensorboard"))
    accumulator.Reload()
    return {
        tag: [(event.step, round(event.value, 4)) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_a_line_has_sorted_keys_step_stage_and_time(tmp_path):
    with MetricWriter(tmp_path / "new" / "run", clock=lambda: 1234.5) as writer:
        writer.write(3, {"loss": np.float32(0.5), "accuracy": 1}, stage="adapt")
    line = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()
    assert line == '{"accuracy": 1.0, "loss": 0.5, "stage": "adapt", "step": 3, "time": 1234.5}\n'


def test_a_line_is_on_disk_before_the_writer_is_closed(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, {"loss": 2.0})
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    writer.close()
    writer.close()


def test_numbers_that_json_lacks_are_written_as_null(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"a": math.nan, "b": -math.inf, "c": 2.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (record["a"], record["b"], record["c"]) == (None, None, 2.0)
    assert json_safe(np.float32("inf")) is None


def test_tensorboard_reads_back_what_was_written(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 4):
            writer.write(step, {"loss/contrastive": step / 2, "bad": math.nan}, stage="adapt")
    assert events(tmp_path) == {"loss/contrastive": [(1, 0.5), (2, 1.0), (3, 1.5)]}


def test_a_resumed_run_has_every_step_once_in_both_records(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 8):
            writer.write(step, {"loss": float(step)}, stage="adapt")
    # The checkpoint was of step 4; steps 5 to 7 happen again, with other figures to tell them apart.
    with MetricWriter(tmp_path) as writer:
        writer.truncate(4)
        for step in range(5, 10):
            writer.write(step, {"loss": 100.0 + step}, stage="adapt")
    expected = [(s, float(s)) for s in range(1, 5)] + [(s, 100.0 + s) for s in range(5, 10)]
    recorded = read_metrics(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in recorded] == expected
    assert events(tmp_path) == {"loss": expected}
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


def test_truncating_keeps_the_lines_before_as_they_were(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.1 + 0.2, "bad": math.nan}, stage="clip")
        before = (tmp_path / "metrics.jsonl").read_text()
        writer.write(2, {"loss": 1.0}, stage="clip")
        writer.truncate(1)
        assert (tmp_path / "metrics.jsonl").read_text() == before
        writer.truncate(0)
        assert (tmp_path / "metrics.jsonl").read_text() == ""


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(1, 60), kept=st.integers(0, 3))
def test_a_line_cut_off_by_a_kill_is_dropped_and_nothing_else(tmp_path_factory, cut, kept):
    workdir = tmp_path_factory.mktemp("run")
    path = workdir / "metrics.jsonl"
    whole = [json.dumps({"step": step, "loss": 0.5, "stage": "adapt", "time": 1.0}) + "\n" for step in range(kept)]
    last = json.dumps({"step": 9, "loss": 0.25, "stage": "adapt", "time": 1.0})
    path.write_text("".join(whole) + last[:cut])
    assert len(read_metrics(path)) == kept
    with MetricWriter(workdir) as writer:
        writer.truncate(10)
        writer.write(11, {})
    assert [record["step"] for record in read_metrics(path)] == [*range(kept), 11]


def test_a_cut_off_line_does_not_spoil_the_next_even_without_truncating(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    with MetricWriter(tmp_path) as writer:
        writer.write(2, {"loss": 1.0})
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"loss": 1.0}'])
def test_a_foreign_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: not a record"):
        read_metrics(path)
    with MetricWriter(tmp_path) as writer, pytest.raises(InputError):
        writer.truncate(1)
    assert line in path.read_text()


def test_a_metric_cannot_take_the_name_of_a_fixed_key(tmp_path):
    with MetricWriter(tmp_path) as writer, pytest.raises(ValueError, match="'stage'"):
        writer.write(1, {"stage": 2.0})


def killed(*_):
    raise KeyboardInterrupt


def test_a_kill_while_truncating_leaves_the_old_record(tmp_path, monkeypatch):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 0.5})
        before = (tmp_path / "metrics.jsonl").read_text()
        monkeypatch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            writer.truncate(1)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_the_bar_shows_stage_loss_speed_and_time_left():
    stream = Terminal()
    with ProgressBar("adapt", 10, stream=stream) as progress:
        for step in range(1, 6):
            progress.update(step, loss=2.0 / step, clips_per_second=48.25)
        progress._bar.refresh()
    last = stream.getvalue().split("\r")[-1]
    assert last.startswith("adapt  50%|")
    assert "5/10" in last and "loss 0.4, 48.2 clips/s" in last
    assert "<" in last and "?" not in last


def test_a_resumed_bar_starts_where_the_run_was():
    stream = Terminal()
    with ProgressBar("blend", 10, initial_step=8, stream=stream) as progress:
        progress.update(9)
        progress._bar.refresh()
    assert "9/10" in stream.getvalue() and " 1/10" not in stream.getvalue()


def test_a_message_stands_on_a_line_of_its_own_above_the_bar():
    stream = Terminal()
    with ProgressBar("adapt", 4, stream=stream) as progress:
        progress.update(1)
        progress.message("clip 7 skipped")
    assert "\rclip 7 skipped\n" in stream.getvalue()


def test_a_file_gets_a_plain_line_now_and_then():
    stream, clock = io.StringIO(), Clock()
    with ProgressBar("adapt", 101, stream=stream, interval=10.0, clock=clock) as progress:
        for step in range(1, 102):
            clock.now = 2.0 * step
            progress.update(step, loss=1 / step, clips_per_second=24.0)
        progress.message("done")
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert lines[0] == "adapt 1/101 (1 %), loss 1, 24.0 clips/s"
    assert lines[1] == "adapt 6/101 (6 %), loss 0.1667, 24.0 clips/s, 03:10 left"
    assert lines[-2:] == ["adapt 101/101 (100 %), loss 0.009901, 24.0 clips/s", "done"]
    assert len(lines) == 1 + 20 + 1


def test_the_last_step_is_told_even_right_after_a_line_and_figures_persist():
    stream, clock = io.StringIO(), Clock()
    progress = ProgressBar("clip", 2, stream=stream, clock=clock)
    progress.update(1, loss=np.float32(3.0), clips_per_second=8.0)
    progress.update(2, clips_per_second=9.0)
    expected = ["clip 1/2 (50 %), loss 3, 8.0 clips/s", "clip 2/2 (100 %), loss 3, 9.0 clips/s"]
    assert stream.getvalue().splitlines() == expected


def test_time_left_of_a_resumed_stage_counts_only_its_own_steps():
    stream, clock = io.StringIO(), Clock()
    progress = ProgressBar("clip", 100, initial_step=50, stream=stream, interval=0.0, clock=clock)
    for step, clock.now in ((51, 60.0), (52, 61.0)):
        progress.update(step)
    # 48 steps of a second each: neither the 50 done before nor the first one's minute of compiling counts.
    assert stream.getvalue().splitlines()[-1] == "clip 52/100 (52 %), 00:48 left"


def test_throughput_over_a_window_of_the_last_steps():
    throughput = Throughput(window=2)
    assert (throughput.clips_per_second, throughput.input_wait_share) == (0.0, 0.0)
    throughput.add(0.0, 90.0, 100.0, clips=1)
    throughput.add(100.0, 101.0, 104.0, clips=48)
    # An evaluation runs between 104 and 200, and counts in neither figure.
    throughput.add(200.0, 200.5, 202.0, clips=48)
    assert throughput.clips_per_second == pytest.approx(96 / 6)
    assert throughput.input_wait_share == pytest.approx(1.5 / 6)


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9), st.integers(1, 64)), min_size=1, max_size=30))
def test_throughput_of_consecutive_steps_is_clips_over_time(steps):
    throughput, now = Throughput(window=len(steps)), 0.0
    for wait, work, clips in steps:
        throughput.add(now, now + wait, now + wait + work, clips)
        now += wait + work
    assert 0.0 <= throughput.input_wait_share <= 1.0
    if now > 1e-3:
        assert throughput.clips_per_second == pytest.approx(sum(step[2] for step in steps) / now)
        assert throughput.input_wait_share == pytest.approx(sum(step[0] for step in steps) / now, abs=1e-6)


def test_throughput_refuses_an_empty_window_and_time_that_runs_backwards():
    with pytest.raises(ValueError, match="at least one"):
        Throughput(window=0)
    with pytest.raises(ValueError, match="backwards"):
        Throughput().add(1.0, 0.5, 2.0, clips=1)
