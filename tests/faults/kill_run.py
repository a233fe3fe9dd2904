"""Kills a short run again and again, at random moments, and starts it again by the same command until it ends.

    make faults KILLS=100

The run has two stages, a worker process that decodes, and a checkpoint every few steps. SIGKILL hits the process alone
or its whole group. After each kill, the next start must resume at the newest complete checkpoint, and no process of the
killed start may live on. A run that comes to its end must have the bits of one that was never killed. Every draw
depends on the seed; what a kill hits also depends on the machine.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from compile_options import FLAGS  # noqa: E402
from run_files import assert_same_state, interrupted, losses, saved_state  # noqa: E402

from experiments.timing import made_with  # noqa: E402
from vlab_jax.datasets import registry  # noqa: E402
from vlab_jax.datasets.records import BuildOptions  # noqa: E402
from vlab_jax.runtime.disk import write_json  # noqa: E402
from vlab_jax.runtime.metrics import read_metrics  # noqa: E402

AIMS = ("any time", "the start", "the first step", "training", "training", "saving", "saving", "end")
MARK = "VLAB_FAULTS_START"  # a variable that every process of a start carries
GONE_WITHIN = 60.0  # seconds after a kill in which worker processes must have ended
START_SECONDS = 600.0  # that a start may take


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a run is: steps of each of its two stages, and between checkpoints."""

    steps: int
    every: int

    @property
    def total(self) -> int:
        return 2 * self.steps


@dataclasses.dataclass
class Kill:
    """One kill: what it was aimed at, what it hit, and what it cost."""

    aim: str
    group: bool
    hit: str
    seconds: float
    recorded: int
    checkpoint: int
    in_stage: bool  # before a stage, the record still has the steps that the kill before cost
    orphans_seconds: float = 0.0

    @property
    def lost(self) -> int:
        """Steps that the killed start computed and that are computed again."""
        return self.recorded - self.checkpoint if self.in_stage else 0


def checkpoint_steps(workdir: pathlib.Path) -> list[int]:
    """The steps of the complete checkpoints: Orbax gives a directory its name when it is complete."""
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def is_saving(workdir: pathlib.Path, since: float) -> bool:
    """Whether a checkpoint that was begun since this time is being written; kills leave older ones."""
    try:
        begun = [path.stat().st_mtime for path in (workdir / "checkpoints").glob("*orbax-checkpoint-tmp*")]
    except FileNotFoundError:  # just renamed
        return False
    return any(each >= since for each in begun)


def recorded_steps(workdir: pathlib.Path) -> int:
    """The last step with a loss in `metrics.jsonl`."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return 0
    lines = path.read_bytes().split(b"\n")[:-1]
    return max((json.loads(line)["step"] for line in lines if b'"loss"' in line), default=0)


class Start:
    """One start of the run; its standard error goes to a file."""

    def __init__(self, run: "KilledRun", number: int) -> None:
        self.workdir, self.mark = run.workdir, f"{run.name}-{number}"
        self._log = run.folder / f"start-{number:03d}.log"
        environment = {**run.environment, MARK: self.mark}
        self.had = recorded_steps(self.workdir)
        self.began, self.wall = time.monotonic(), time.time()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                run.command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def in_stage(self) -> bool:
        """Whether it has begun a stage; by then `metrics.jsonl` ends at the checkpoint that it resumed at."""
        return "\nstage " in f"\n{self.log()}"

    def resumed_at(self) -> int | None:
        found = re.search(r"resuming from .*/checkpoints/(\d+)", self.log())
        return int(found.group(1)) if found else None

    def phase(self) -> str:
        """What the run is doing."""
        log = self.log()
        if is_saving(self.workdir, self.wall):
            return "saving"
        if not self.in_stage():
            return "starting"
        if recorded_steps(self.workdir) <= min(self.had, self.resumed_at() or 0):
            return "compiling the step"
        if "report:" in log or re.search(r"evaluated \d+ clips[^\n]*\n[^\n]*$", log):
            return "evaluating"
        return "training"

    def kill(self, group: bool) -> None:
        """Kills the process, or its group, and waits for it."""
        if group:
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()
        self.process.wait()


def processes_of(mark: str) -> list[psutil.Process]:
    """The processes of a start that are still alive."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


class KilledRun:
    """A workdir, the command that trains in it, and the kills so far."""

    def __init__(
        self, folder: pathlib.Path, length: Length, data: pathlib.Path, cache: str, rng: random.Random
    ) -> None:
        self.folder, self.name, self.rng = folder, f"{folder.name}-{os.getpid()}", rng
        self.length = length
        self.workdir = folder / "workdir"
        folder.mkdir(parents=True, exist_ok=True)
        self.command = [
            *(sys.executable, "-m", "vlab_jax.main"),
            f"--config={ROOT / 'tests' / 'tiny_run.py'}",
            f"--workdir={self.workdir}",
            f"--config.data.directory={data}",
            "--config.data.workers=1",
            f"--config.checkpoint.every={length.every}",
            *(f"--config.stage.{stage}.steps={length.steps}" for stage in ("adapt", "blend")),
        ]
        flags = os.environ.get("XLA_FLAGS", "").split()
        flags = " ".join([*flags, *(flag for flag in FLAGS if flag not in flags)])
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.kills: list[Kill] = []
        self.finished = False
        self._starts = self._newest = 0

    def begin_at(self, step: int, undisturbed: pathlib.Path) -> None:
        """Begins at a checkpoint of another run."""
        interrupted(undisturbed, self.workdir, step)
        self._newest = step

    def start(self) -> Start:
        self._starts += 1
        return Start(self, self._starts)

    def finish(self) -> None:
        """Lets the run go to its end."""
        start = self.start()
        _wait(lambda: start.process.poll() is not None, start, "it does not end")
        self._ended(start)

    def kill_once(self, aim: str = "") -> Kill | None:
        """Starts the run and kills it at a random moment of those that `aim` names; None if it ended before."""
        aim = aim or self.rng.choice(AIMS)
        due = self._due(aim)
        group = self.rng.random() < 0.5
        start = self.start()
        _wait(lambda: due(start) or start.process.poll() is not None, start, f"it is never {aim}")
        if start.process.poll() is not None:
            self._ended(start)
            return None
        hit = start.phase()
        seconds = start.seconds()
        start.kill(group)
        self._check_resumed(start)
        steps = checkpoint_steps(self.workdir)
        newest = steps[-1] if steps else 0
        kill = Kill(aim, group, hit, seconds, recorded_steps(self.workdir), newest, start.in_stage())
        self.kills.append(kill)
        # When a checkpoint is due, the run waits for the save before: at most one is incomplete.
        most = self.length.every * (2 if hit == "saving" else 1)
        assert kill.lost <= most, f"{kill} lost {kill.lost} steps"
        self._check_gone(start, kill)
        self._newest = kill.checkpoint
        return kill

    def _due(self, aim: str) -> Callable[[Start], bool]:
        """A function that tells when to kill."""
        rng, workdir, length = self.rng, self.workdir, self.length
        if aim in ("any time", "the start"):
            seconds = rng.uniform(0.0, 30.0 if aim == "any time" else 4.0)
            return lambda start: start.seconds() >= seconds
        delay = rng.uniform(0.0, {"the first step": 5.0, "training": 0.1, "saving": 0.15, "end": 6.0}[aim])
        reached = {
            "the first step": Start.in_stage,
            "training": _more_steps(workdir, rng.randint(1, max(2 * length.every, 2))),
            "saving": _nth_save(workdir, rng.randint(1, min(3, (length.total - self._newest) // length.every))),
            "end": lambda start: recorded_steps(workdir) in (length.steps, length.total),
        }[aim]
        return _after(reached, delay)

    def _check_resumed(self, start: Start) -> None:
        """A start that has begun a stage must have resumed at the newest complete checkpoint."""
        if start.in_stage():
            assert (start.resumed_at() or 0) == self._newest, f"resumed at {start.resumed_at()}, not {self._newest}"

    def _check_gone(self, start: Start, kill: Kill) -> None:
        began = time.monotonic()
        while alive := processes_of(start.mark):
            assert time.monotonic() - began < GONE_WITHIN, f"after {kill}, these live on: {alive}"
            time.sleep(0.05)
        kill.orphans_seconds = time.monotonic() - began

    def _ended(self, start: Start) -> None:
        assert start.process.returncode == 0, f"status {start.process.returncode}:\n{start.log()[-3000:]}"
        self._check_resumed(start)
        self.finished = True


def _after(reached: Callable[[Start], bool], delay: float) -> Callable[[Start], bool]:
    """So many seconds after `reached` is first true."""
    since: dict[Start, float] = {}

    def due(start: Start) -> bool:
        if start not in since and reached(start):
            since[start] = time.monotonic()
        return start in since and time.monotonic() - since[start] >= delay

    return due


def _more_steps(workdir: pathlib.Path, count: int) -> Callable[[Start], bool]:
    """True once a start has recorded so many steps of its own."""

    def reached(start: Start) -> bool:
        if not start.in_stage():
            return False
        return recorded_steps(workdir) >= (start.resumed_at() or 0) + count

    return reached


def _nth_save(workdir: pathlib.Path, count: int) -> Callable[[Start], bool]:
    """True while a start's n-th checkpoint is written."""

    def reached(start: Start) -> bool:
        if not start.in_stage() or not is_saving(workdir, start.wall):
            return False
        resumed = start.resumed_at() or 0
        return sum(step > resumed for step in checkpoint_steps(workdir)) >= count - 1

    return reached


def _wait(reached: Callable[[], bool], start: Start, otherwise: str) -> None:
    while not reached():
        assert start.seconds() < START_SECONDS, f"{otherwise}:\n{start.log()[-3000:]}"
        time.sleep(0.004)


def assert_same_end(killed: pathlib.Path, undisturbed: pathlib.Path, steps: int) -> None:
    """Compares the bits of all parameters, each step's loss (recorded once), and every figure."""
    assert_same_state(saved_state(killed), saved_state(undisturbed))
    assert losses(killed) == losses(undisturbed)
    assert [step for step, *_ in losses(killed)] == list(range(1, steps + 1))
    assert _figures(killed) == _figures(undisturbed)
    results = [json.loads((workdir / "results.json").read_text()) for workdir in (killed, undisturbed)]
    assert results[0] == results[1] and results[0]


def _figures(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The records of evaluations, without the time."""
    records = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k != "time"} for record in records if "loss" not in record]


class Trial:
    """Runs that are killed, one after the other, and one that is not, for comparison.

    Args:
      folder: where they go.
      undisturbed: the workdir of a run of that length that was not killed; None: one is made.
      cache: the folder for compiled programs.
      first: the step of the undisturbed run's checkpoint at which the runs begin; 0: they begin anew.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        seed: int,
        length: Length,
        data: pathlib.Path,
        undisturbed: pathlib.Path | None = None,
        cache: str = "",
        first: int = 0,
    ) -> None:
        self.folder, self.rng, self.length, self.data = folder, random.Random(seed), length, data
        self.cache, self.first = cache or str(folder / "compiled"), first
        self.runs: list[KilledRun] = []
        registry.prepare("motion/tiny", BuildOptions(str(data)))
        if undisturbed is None:
            run = KilledRun(folder / "undisturbed", length, data, self.cache, self.rng)
            run.finish()
            undisturbed = run.workdir
        self.undisturbed = undisturbed

    def run(self, kills: int, aims: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Kill]:
        """Makes so many kills, in as many runs as it takes; each run goes on to its end and is compared.

        Args:
          aims: of the first kills; those of the others are drawn.
        """
        done: list[Kill] = []
        while len(done) < kills:
            number = len(self.runs) + 1
            cold = number % 4 == 2  # compiles anew: a kill may then hit the compilation and its cache
            cache = str(self.folder / f"compiled-{number}") if cold else self.cache
            run = KilledRun(self.folder / f"run-{number:02d}", self.length, self.data, cache, self.rng)
            self.runs.append(run)
            if self.first:
                run.begin_at(self.first, self.undisturbed)
            while not run.finished and len(done) < kills:
                if kill := run.kill_once(aims[len(done)] if len(done) < len(aims) else ""):
                    done.append(kill)
                    who = "the group" if kill.group else "the process"
                    log(
                        f"kill {len(done)} of {who} after {kill.seconds:.1f} s, {kill.hit}: "
                        f"{kill.recorded} steps done, checkpoint {kill.checkpoint}"
                    )
            if not run.finished:
                run.finish()
            assert_same_end(run.workdir, self.undisturbed, self.length.total)
            log(f"run {number} ended after {len(run.kills)} kills with the bits of the undisturbed one")
        return done


def summary(kills: list[Kill], length: Length, runs: int, seconds: float, seed: int) -> dict[str, Any]:
    """The record of a trial."""
    return {
        "kills": len(kills),
        "runs": runs,
        "seed": seed,
        "of_the_whole_group": sum(kill.group for kill in kills),
        "hit": dict(collections.Counter(kill.hit for kill in kills).most_common()),
        "most_steps_lost": max(kill.lost for kill in kills),
        "mean_steps_lost": round(sum(kill.lost for kill in kills) / len(kills), 2),
        "length": dataclasses.asdict(length),
        "longest_life_of_a_worker_process_after_a_kill": round(max(kill.orphans_seconds for kill in kills), 2),
        "all_ended_with_the_same_bits": True,
        "minutes": round(seconds / 60, 1),
        "made_with": made_with(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="a file for the summary (JSON)")
    given = parser.parse_args()
    began, length = time.monotonic(), Length(steps=30, every=5)
    with tempfile.TemporaryDirectory(prefix="vlab-jax-faults-") as folder:
        trial = Trial(pathlib.Path(folder), given.seed, length, pathlib.Path(folder) / "data")
        kills = trial.run(given.kills, log=lambda line: print(line, flush=True))
    found = summary(kills, length, len(trial.runs), time.monotonic() - began, given.seed)
    print(json.dumps(found, indent=2))
    if given.out:
        write_json(given.out, found)


if __name__ == "__main__":
    main()
