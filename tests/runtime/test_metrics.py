"""Metrics survive kills and resumption with every step once; progress in a file is a line now and then."""

import io
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vlab_jax.errors import InputError
from vlab_jax.runtime.metrics import MetricWriter, ProgressBar, json_safe, read_metrics


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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


def test_the_bar_shows_stage_figures_and_time_left():
    stream = Terminal()
    with ProgressBar("adapt", 10, stream=stream) as progress:
        for step in range(1, 6):
            progress.update(step, f"loss {2.0 / step:.4g}, 48.2 clips/s")
        progress._bar.refresh()
    last = stream.getvalue().split("\r")[-1]
    assert last.startswith("adapt  50%|")
    assert "5/10" in last and "loss 0.4, 48.2 clips/s" in last
    assert "<" in last and "?" not in last


def test_a_resumed_bar_starts_where_the_run_was():
    stream = Terminal()
    with ProgressBar("blend", 10, initial=8, stream=stream) as progress:
        progress.update(9)
        progress._bar.refresh()
    assert "9/10" in stream.getvalue() and " 1/10" not in stream.getvalue()


def test_a_file_gets_plain_lines_now_and_then_and_the_last_one():
    stream = io.StringIO()
    with ProgressBar("adapt", 4, stream=stream, interval=0.0) as progress:
        for step in (1, 2):
            progress.update(step, f"loss {step}")
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert lines[0].startswith("adapt 0/4 (0 %) [")
    assert lines[1].startswith("adapt 1/4 (25 %), loss 1 [") and lines[2].startswith("adapt 2/4 (50 %), loss 2 [")
    rare = io.StringIO()
    with ProgressBar("adapt", 100, stream=rare, interval=3600.0) as progress:
        for step in range(1, 101):
            progress.update(step)
    assert [line.partition(" [")[0] for line in rare.getvalue().splitlines()] == [
        "adapt 0/100 (0 %)",
        "adapt 100/100 (100 %)",
    ]


def test_a_process_that_shows_nothing_writes_nothing():
    stream = io.StringIO()
    with ProgressBar("adapt", 4, shown=False, stream=stream) as progress:
        progress.update(4)
    assert stream.getvalue() == ""
