"""All measurements on one accelerator, in one command.

    python -m experiments.speed.accelerator                            on an H200: L/14, bfloat16, eight minutes at most
    python -m experiments.speed.accelerator --compiled=compiled.json   beside the output of `vlab_jax.compile --json`
    python -m experiments.speed.accelerator --size=tiny --adapt=4 --blend=4 --steps=3 --cases=4    a trial, anywhere
    python -m experiments.speed.accelerator --data=folder:/a/directory/of/videos --pytorch        with all options

Measures 20 steps of `adapt` and of `blend` (`steps.py`: clips a second, MFU, memory), and compares attention with
NumPy's (`attention.py`). Each part is a process of its own, so that peak memory is measured for each, and a failure
does not stop the others; the record is written after each part. Weights, frames and tokens are random arrays: beside
jax, flax, optax and orbax-checkpoint this needs jaxtyping, ml_collections, absl-py and their requirements
(wadler-lindig, and PyYAML, which flax brings).

`--pytorch` adds a comparison of one step of both stages with the same model in PyTorch (`train_step.py`; both are on
the device at once). `--data` adds a run of `vlab_jax.main` on the `frames` variant of the data (docs/frames.md), which
records how long it waits for clips. These two need all of requirements.txt, and have no time limit. If the peak of a
device is not known, MFU is left out.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from experiments.speed import children, program, train_step
from experiments.timing import add_record

RESULTS = pathlib.Path(__file__).with_name("accelerator.json")
ROOT = pathlib.Path(__file__).parents[2]


class Goal(NamedTuple):
    """The goal of a figure: at least `bound`, or with `below` less than it."""

    figure: str
    bound: float
    below: bool = False

    def reached(self, figures: Mapping[str, float]) -> bool | None:
        """Whether the goal is reached; None if the figure is missing."""
        if self.figure not in figures:
            return None
        return figures[self.figure] < self.bound if self.below else figures[self.figure] >= self.bound


GOALS = (
    Goal("MFU, blend", 0.50),
    Goal("MFU, adapt", 0.45),
    Goal("ours over PyTorch, blend", 1.2),
    Goal("share of waiting for clips", 0.02, below=True),
)


def answers(given: argparse.Namespace, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The result of each part, or the reason of its failure; `tell` is called with all results after each part."""
    deadline, found = time.monotonic() + 60 * given.minutes, {}
    # Each part has the device for itself, so it may preallocate nearly all memory.
    environment = {
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", ""),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
    }
    step = [f"--size={given.size}", f"--dtype={given.dtype}", f"--steps={given.steps}"]
    parts = {
        "adapt": ("experiments.speed.steps", [*step, "--stage=adapt", f"--batch={given.adapt}"]),
        "blend": ("experiments.speed.steps", [*step, "--stage=blend", f"--batch={given.blend}"]),
        "attention": ("experiments.speed.attention", [f"--cases={given.cases}"]),
    }
    for name, (module, arguments) in parts.items():
        left = max(deadline - time.monotonic(), 1.0)
        print(f"{name}: {module} {' '.join(arguments)}, {left:.0f} s left", file=sys.stderr, flush=True)
        if module.endswith("attention"):
            arguments = [*arguments, f"--seconds={max(left - 30, 1):.0f}"]  # one case may take a while
        try:
            found[name] = children.answer(module, arguments, environment=environment, timeout=left)
        except RuntimeError as error:
            found[name] = {"failed": str(error)}
            print(f"{name} failed: {error}", file=sys.stderr, flush=True)
        tell(found)
    return found


def beside_pytorch(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The records of the comparison with PyTorch, for both stages."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both libraries share the GPU's memory
    records = {}
    for stage, batch in (("blend", given.blend), ("adapt", given.adapt)):
        config = program.configured(given.size, stage, batch, dtype=given.dtype, remat="dots")
        records[stage] = train_step.measured(program.prepared(config, stage, program.one_device()), stage, repeats=10)
    return records


def run(given: argparse.Namespace, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The metrics of a run of the `blend` stage on stored frames, without the first lines, which wait for the compiler.

    Raises:
      RuntimeError: the run failed, with the end of its output.
    """
    from vlab_jax.runtime.metrics import METRICS_FILE, read_metrics  # here: it needs more packages

    # Each line is a mean over ten steps; the first third of the lines is left out.
    fields = {
        "stages": "('blend',)",
        "stage.blend.batch_size": given.blend,
        "dtype": given.dtype,
        "data.variant": "frames",
        "data.directory": given.directory or str(workdir / "data"),
        "log_every": 10,
        "stop_after": 60,
    }
    command = [sys.executable, "-m", "vlab_jax.main", f"--config=configs/pretrain.py:{given.size},data={given.data}"]
    command += [f"--workdir={workdir / 'run'}", *(f"--config.{name}={value}" for name, value in fields.items())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    lines = read_metrics(workdir / "run" / METRICS_FILE)
    return lines[len(lines) // 3 :]


def figures(
    found: Mapping[str, Mapping[str, Any]],
    peers: Mapping[str, Mapping[str, Any]] | None = None,
    lines: list[dict[str, Any]] | None = None,
) -> dict[str, float]:
    """The figures with goals, as far as they exist, from `answers`, `beside_pytorch` and `run`."""
    made = {f"MFU, {name}": each["MFU"] for name, each in found.items() if "MFU" in each}
    for stage, record in (peers or {}).items():
        made[f"ours over PyTorch, {stage}"] = record["ours over PyTorch, throughput"]
    if lines:
        made["share of waiting for clips"] = statistics.mean(line["input_wait_share"] for line in lines)
        made["clips a second of the run"] = statistics.mean(line["clips_per_second"] for line in lines)
        if "mfu" in lines[-1]:
            made["MFU of the run"] = statistics.mean(line["mfu"] for line in lines)
    return made


def summary(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each stage, and one for attention."""
    lines = ["| stage | clips | ms a step | clips/s | MFU | GiB at the peak | GiB by the compiler |", "|" + "---|" * 7]
    for name in ("adapt", "blend"):
        each = found.get(name, {"failed": "not begun"})
        if "failed" in each:
            lines.append(f"| {name} | failed: {each['failed'].splitlines()[-1]} |")
            continue
        mfu = f"{100 * each['MFU']:.1f} %" if "MFU" in each else ""
        peak = each["memory of the device"].get("peak_bytes_in_use")
        memory = (
            "" if peak is None else f"{peak / 2**30:.1f}",
            f"{each['memory by the compiler']['needed'] / 2**30:.1f}",
        )
        speed = f"{1e3 * each['seconds']:.1f} | {each['clips a second']:.1f}"
        lines.append(f"| {name} | {each['clips']} | {speed} | {mfu} | {' | '.join(memory)} |")
    checked = found.get("attention", {"failed": "not begun"})
    if "failed" in checked:
        return "\n".join([*lines, f"\nattention: failed: {checked['failed'].splitlines()[-1]}"])
    wrong = checked["wrong"]
    return "\n".join([*lines, f"\nattention: {checked['cases']} cases, {len(wrong)} findings", *wrong])


def table(found: Mapping[str, float]) -> str:
    """A line for each goal: the bound, the measurement, and whether it is reached."""
    verdicts = {True: "reached", False: "missed", None: "not measured here"}
    lines = ["| figure | goal | measured | |", "|---|---|---|---|"]
    for goal in GOALS:
        value = f"{found[goal.figure]:.3f}" if goal.figure in found else ""
        bound = f"{'<' if goal.below else '≥'} {goal.bound}"
        lines.append(f"| {goal.figure} | {bound} | {value} | {verdicts[goal.reached(found)]} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the tables and adds the record to a file; ends with status 1 if a part failed or attention is
    wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="l14", choices=sorted(program.SIZES), help="a size in configs/sizes.py")
    parser.add_argument("--adapt", type=int, default=128, help="maximum clips in a step of `adapt`")
    parser.add_argument("--blend", type=int, default=64, help="maximum clips in a step of `blend`")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=20, help="steps of each stage")
    parser.add_argument("--cases", type=int, default=60, help="maximum number of attention cases")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of the parts")
    parser.add_argument("--compiled", type=pathlib.Path, help="output of vlab_jax.compile --json, for comparison")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="the JSON file of records")
    parser.add_argument("--pytorch", action="store_true", help="also compare a step with PyTorch")
    parser.add_argument("--data", default="", help="also run on this data set (as in config.data.train)")
    parser.add_argument("--directory", default="", help="where it is built; empty: a temporary folder")
    given = parser.parse_args()
    record: dict[str, Any] = {name: value for name, value in vars(given).items() if name not in ("compiled", "out")}
    if given.compiled:
        record["vlab_jax.compile"] = json.loads(given.compiled.read_text())

    def tell(found: Mapping[str, Mapping[str, Any]]) -> None:
        devices = [each["device"] for each in found.values() if "device" in each]
        if devices:  # a failed part does not name its device
            add_record(given.out, f"{given.size}, {given.dtype}, {devices[0]}", {**record, **found})

    found, peers, lines = answers(given, tell), None, None
    if given.data:
        with tempfile.TemporaryDirectory() as folder:
            lines = run(given, pathlib.Path(folder))  # before this process initialises the device
    if given.pytorch:
        peers = beside_pytorch(given)
        record["beside PyTorch"] = peers
    record["figures"] = figures(found, peers, lines)
    tell(found)
    print(summary(found), table(record["figures"]), sep="\n\n")
    if any("failed" in each for each in found.values()) or found["attention"]["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
