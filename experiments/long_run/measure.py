"""A long run in miniature: 20,000 steps of a tiny model in one process, and the resources that it holds meanwhile.

    python -m experiments.long_run.measure

The run trains with one decoding worker process, saves every 500 steps and evaluates every 2,000. Every few seconds its
memory, that of its worker processes, and its open files, threads and processes are read from outside; after the warm-up
none of them may grow by more than 5 %. Writes `results.json` and `growth.png` beside this file.
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
from collections.abc import Callable, Sequence
from typing import NamedTuple

import psutil
from matplotlib.figure import Figure

from experiments.timing import made_with
from vlab_jax.runtime.disk import write_json
from vlab_jax.runtime.metrics import METRICS_FILE

FOLDER = pathlib.Path(__file__).parent
ROOT = FOLDER.parents[1]
CONFIG = ROOT / "tests" / "tiny_run.py"
STEPS, ADAPT, EVERY, EVALUATE = 20_000, 200, 500, 2000
WARM_UP = 0.2  # share of the steps for everything that is cached, compiled and opened once
MOST = 0.05  # allowed growth
SHOWN = {
    "own_mib": "memory of the process, MiB",
    "workers_mib": "memory of its worker processes, MiB",
    "files": "open files",
    "threads": "threads",
    "processes": "processes below it",
}


class Sample(NamedTuple):
    """The resources of a run at one time. Memory is resident; pages that workers share count in each of them."""

    seconds: float
    step: int
    own_mib: float
    workers_mib: float
    files: int
    threads: int
    processes: int


def command(workdir: pathlib.Path, data: pathlib.Path, steps: int) -> list[str]:
    """The command line of the run."""
    fields = {
        "data.directory": data,
        "data.workers": 1,
        "stage.adapt.steps": ADAPT,
        "stage.blend.steps": steps - ADAPT,
        "stage.adapt.batch_size": 4,
        "stage.blend.batch_size": 4,
        "stage.blend.evaluate_every": EVALUATE,
        "checkpoint.every": EVERY,
        "log_every": 10,
    }
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    return [sys.executable, "-m", "vlab_jax.main", f"--config={CONFIG}", f"--workdir={workdir}", *given]


def sample(process: psutil.Process, began: float, step: int) -> Sample | None:
    """The current resources of a process and its children; None if it has just ended."""
    try:
        below = process.children(recursive=True)
        workers = sum(_resident(each) for each in below)
        with process.oneshot():
            own = process.memory_info().rss
            held = process.num_fds(), process.num_threads()
    except psutil.Error:
        return None
    return Sample(time.monotonic() - began, step, own / 2**20, workers / 2**20, *held, len(below))


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:  # has ended meanwhile
        return 0


def last_step(workdir: pathlib.Path) -> int:
    """The newest recorded step; 0 if there is none."""
    path = workdir / METRICS_FILE
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines and lines[-1].startswith(b"{") else 0


def watch(arguments: Sequence[str], workdir: pathlib.Path, interval: float, log: Callable[[str], None]) -> list[Sample]:
    """Runs a command to its end, and samples its resources meanwhile."""
    began, samples = time.monotonic(), []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = workdir.with_suffix(".log")
    with log.open("wb") as file, subprocess.Popen(arguments, env=environment, stderr=file, stdout=file) as run:
        process = psutil.Process(run.pid)
        while run.poll() is None:
            if found := sample(process, began, last_step(workdir)):
                samples.append(found)
                if len(samples) % 20 == 0:
                    log(str(found))
            time.sleep(interval)
    if run.returncode:
        raise RuntimeError(f"the run ended with status {run.returncode}: {log.read_text()[-2000:]}")
    return samples


def growth(samples: Sequence[Sample], steps: int) -> dict[str, dict[str, float]]:
    """Medians of the first and the last quarter after the warm-up, and their growth."""
    kept = [each for each in samples if WARM_UP * steps <= each.step < steps]
    quarter = max(len(kept) // 4, 1)
    found = {}
    for name in SHOWN:
        first = statistics.median(getattr(each, name) for each in kept[:quarter])
        last = statistics.median(getattr(each, name) for each in kept[-quarter:])
        found[name] = {"first": round(first, 1), "last": round(last, 1), "growth": round(last / first - 1, 4)}
    return found


def plot(samples: Sequence[Sample], steps: int, path: pathlib.Path) -> None:
    """Plots each resource over the steps."""
    figure = Figure(figsize=(8, 9), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(len(SHOWN), sharex=True), SHOWN.items(), strict=True):
        axes.plot([each.step for each in samples], [getattr(each, name) for each in samples], linewidth=1)
        axes.axvline(WARM_UP * steps, color="grey", linestyle=":")
        axes.set_ylabel(label.replace(", ", ",\n"))
        axes.set_ylim(bottom=0)
    axes.set_xlabel("steps (right of the dotted line: after the warm-up)")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--interval", type=float, default=3.0, help="seconds between samples")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vlab-jax-long-run-") as folder:
        workdir = pathlib.Path(folder) / "workdir"
        arguments = command(workdir, pathlib.Path(folder) / "data", given.steps)
        samples = watch(arguments, workdir, given.interval, lambda line: print(line, flush=True))
    found = growth(samples, given.steps)
    content = {
        "steps": given.steps,
        "minutes": round(samples[-1].seconds / 60, 1),
        "samples": len(samples),
        "after_warm_up": found,
        "made_with": {**made_with(), "cores": os.cpu_count()},
        "every_tenth_sample": [list(each) for each in samples[::10]],
        "columns": list(Sample._fields),
    }
    write_json(given.out / "results.json", content, indent=None)
    plot(samples, given.steps, given.out / "growth.png")
    print(json.dumps(found, indent=2))
    grown = [name for name, each in found.items() if each["growth"] > MOST]
    if grown:
        sys.exit(f"grown by more than {MOST:.0%}: {', '.join(grown)}")


if __name__ == "__main__":
    main()
