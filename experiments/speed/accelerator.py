"""All that is asked of one accelerator, in one command: utilisation, the ratio to PyTorch, and waiting for clips.

    python -m experiments.speed.accelerator --data=folder:/a/directory/of/videos                    on an H200
    python -m experiments.speed.accelerator --size=tiny --dtype=float32 --blend=2 --adapt=2 --frames=2 --repeats=1 \\
        --data=motion/tiny --steps=6                                                   a trial, on any machine

Measured are a training step of `blend` and of `adapt` beside the same model in PyTorch (`train_step.py` says what is
compared), and a run of `vlab_jax.main` on the `frames` variant of the data (docs/frames.md), which says itself how long
it waits for clips. `--blend` and `--adapt` are clips of a step: as many as both models have room for, since both are on
the device at once. Where the peak of a device is not known, MFU is left out.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.speed import program, train_step
from experiments.timing import add_record, made_with
from vlab_jax.runtime.meters import METRICS_FILE, read_metrics

RESULTS = pathlib.Path(__file__).with_name("accelerator.json")
ROOT = pathlib.Path(__file__).parents[2]


class Goal(NamedTuple):
    """What a figure should be: at least `bound`, or with `below` less than it."""

    figure: str
    bound: float
    below: bool = False

    def reached(self, figures: Mapping[str, float]) -> bool | None:
        """None where the figure is not there."""
        if self.figure not in figures:
            return None
        return figures[self.figure] < self.bound if self.below else figures[self.figure] >= self.bound


GOALS = (
    Goal("MFU, blend", 0.50),
    Goal("MFU, adapt", 0.45),
    Goal("ours over PyTorch, blend", 1.2),
    Goal("share of waiting for clips", 0.02, below=True),
)


def steps(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The records of both stages' steps."""
    records = {}
    for stage, batch in (("blend", given.blend), ("adapt", given.adapt)):
        options = {"frames": given.frames, "dtype": given.dtype, "remat": given.remat}
        config = program.configured(given.size, stage, batch, **options)
        records[stage] = train_step.measured(
            program.prepared(config, stage, program.one_device()), stage, given.repeats
        )
    return records


def run(given: argparse.Namespace, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """What a run of the `blend` stage on stored frames records, without its first lines, which wait for the compiler.

    Raises:
      RuntimeError: it failed; the last of what it said.
    """
    # Each line is a mean over steps; the first third is left out.
    every = max(given.steps // 6, 1)
    fields = {
        "stages": "('blend',)",
        "stage.blend.batch_size": given.blend,
        "frames": given.frames,
        "image_frames": max(given.frames // 2, 1),
        "dtype": given.dtype,
        "model.remat": given.remat,
        "data.variant": "frames",
        "data.directory": given.directory or str(workdir / "data"),
        "log_every": every,
        "stop_after": given.steps,
    }
    command = [sys.executable, "-m", "vlab_jax.main", f"--config=configs/pretrain.py:{given.size},data={given.data}"]
    command += [f"--workdir={workdir / 'run'}", *(f"--config.{name}={value}" for name, value in fields.items())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    lines = read_metrics(workdir / "run" / METRICS_FILE)
    return lines[len(lines) // 3 :]


def figures(records: Mapping[str, Mapping[str, Any]], lines: list[dict[str, Any]]) -> dict[str, float]:
    """The figures that goals are of, as far as they are there."""
    found = {"share of waiting for clips": statistics.mean(line["input_wait_share"] for line in lines)}
    found["clips a second of the run"] = statistics.mean(line["clips_per_second"] for line in lines)
    if "mfu" in lines[-1]:
        found["MFU of the run"] = statistics.mean(line["mfu"] for line in lines)
    for stage, record in records.items():
        found[f"ours over PyTorch, {stage}"] = record["ours over PyTorch, throughput"]
        if "MFU" in record:
            found[f"MFU, {stage}"] = record["MFU"]["ours"]
    return found


def table(found: Mapping[str, float]) -> str:
    """A line for each goal: what is asked, what was measured, whether it is reached."""
    said = {True: "reached", False: "missed", None: "not measured here"}
    lines = ["| figure | goal | measured | |", "|---|---|---|---|"]
    for goal in GOALS:
        value = f"{found[goal.figure]:.3f}" if goal.figure in found else ""
        bound = f"{'<' if goal.below else '≥'} {goal.bound}"
        lines.append(f"| {goal.figure} | {bound} | {value} | {said[goal.reached(found)]} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table and adds the record to `accelerator.json`."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is for both
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="l14", choices=sorted(program.SIZES), help="of configs/sizes.py")
    parser.add_argument("--data", required=True, help="a data set, as in config.data.train")
    parser.add_argument("--directory", default="", help="where it is built; empty: built anew, and removed afterwards")
    parser.add_argument("--blend", type=int, default=64, help="clips of a step of `blend`")
    parser.add_argument("--adapt", type=int, default=128, help="clips of a step of `adapt`")
    parser.add_argument("--frames", type=int, default=8, help="of a clip; the image stream takes half")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", default="dots", choices=("none", "dots", "full"))
    parser.add_argument("--repeats", type=int, default=10, help="steps that are counted")
    parser.add_argument("--steps", type=int, default=60, help="of the run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = run(given, pathlib.Path(folder))  # first: it needs the device for itself
    records = steps(given)
    found = figures(records, lines)
    record = {**vars(given), "figures": found, "steps": records, **made_with()}
    add_record(RESULTS, f"{given.size}, {given.frames} frames, {given.dtype}, {record['device']}", record)
    print(table(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
