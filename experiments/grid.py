"""Runs every arm of experiments with every seed, and records the results.

    python -m experiments.grid adapting --workdir=/somewhere/large
    python -m experiments.grid adapting --arms=conv,none --seeds=2 --workdir=/somewhere/large
    python -m experiments.grid adapting blending objectives --jobs=2 --workdir=/somewhere/large

`--jobs` is the number of runs at a time, each on its part of the CPUs: a tiny model uses one core well, and gains
little from a second one.

An experiment is a folder with a `config.py`: `ARMS` maps its arms to their numbers of seeds, and `get_config(arm)` is
the arm's config, which `vlab_jax.main` runs like any other. Seeds are the runs' `config.seed`, the same for all arms,
so that arms can be compared in pairs.

A second start continues: it skips recorded runs, and resumes an interrupted one. A record (in the folder's
`results.json`) has arm, seed, hash of the config, commit, machine, seconds, and every score of the run. The hash of the
config identifies a run; another config is another run. To repeat recorded runs, remove the file.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import importlib
import json
import os
import pathlib
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.timing import commit
from vlab_jax.config import plain, stage_config, training_config
from vlab_jax.errors import InputError
from vlab_jax.runtime.disk import write_json
from vlab_jax.training.setup import differences

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
RESULTS = "results.json"

Record = dict[str, Any]


class Run(NamedTuple):
    """One arm of an experiment, with one seed."""

    experiment: str
    arm: str
    seed: int


def arms_of(experiment: str) -> dict[str, int]:
    """The arms of an experiment, each with its number of seeds.

    Raises:
      InputError: there is no such experiment.
    """
    return dict(module_of(experiment).ARMS)


def config_of(experiment: str, arm: str, seed: int) -> ConfigDict:
    """The config of one run."""
    config = module_of(experiment).get_config(arm)
    config.seed = seed
    return config


def config_hash(config: ConfigDict) -> str:
    """Twelve hexadecimal digits that identify what a config computes, whatever its seed.

    Only fields that differ from their default count: if the package gets a new field whose default changes no run,
    the hashes of recorded runs stay the same.
    """
    fields = plain(config.to_dict())
    defaults = plain(training_config().to_dict())
    defaults["stage"] = {name: plain(stage_config().to_dict()) for name in fields["stage"]}
    given = sorted(differences(defaults, {**fields, "seed": defaults["seed"]}))
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()[:12]


def results_of(experiment: str) -> pathlib.Path:
    """The file with the records of an experiment."""
    return HERE / experiment / RESULTS


def read_records(experiment: str) -> list[Record]:
    """The records of an experiment; empty if it has not been run."""
    path = results_of(experiment)
    return json.loads(path.read_text())["runs"] if path.is_file() else []


def pending(experiment: str, records: list[Record], arms: dict[str, int]) -> list[Run]:
    """The runs without a record, seed by seed, so that early results compare all arms."""
    done = {(record["arm"], record["seed"]) for record in current(experiment, records)}
    return [
        Run(experiment, arm, seed)
        for seed in range(max(arms.values(), default=0))
        for arm, seeds in arms.items()
        if seed < seeds and (arm, seed) not in done
    ]


def current(experiment: str, records: list[Record]) -> list[Record]:
    """The records of the arms' current configs."""
    hashes = {arm: config_hash(config_of(experiment, arm, 0)) for arm in arms_of(experiment)}
    return [record for record in records if record["config"] == hashes.get(record["arm"])]


def train(workdir: pathlib.Path, run: Run, cpus: set[int] | None = None) -> Record:
    """Trains one run in a process of its own, below `workdir`, on these CPUs or on all, and returns its record.

    Raises:
      InputError: the run failed; the message names its log.
    """
    experiment, arm, seed = run
    digest = config_hash(config_of(experiment, arm, seed))
    folder = workdir / f"{arm}-{seed}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    config = module_of(experiment).__file__
    command = [sys.executable, "-m", "vlab_jax.main", f"--config={config}:{arm}", f"--config.seed={seed}"]
    started = time.time()
    keep_to = (lambda: os.sched_setaffinity(0, cpus)) if cpus else None
    with (folder / "log.txt").open("a") as log:
        done = subprocess.run(
            [*command, f"--workdir={folder}"], cwd=ROOT, stdout=log, stderr=log, check=False, preexec_fn=keep_to
        )
    if done.returncode:
        raise InputError(f"{arm} with seed {seed} ended with status {done.returncode}; see {folder / 'log.txt'}")
    return {
        "arm": arm,
        "seed": seed,
        "config": digest,
        "commit": commit(),
        "machine": f"{platform.machine()}, {platform.python_version()}",
        "seconds": round(time.time() - started),
        "rows": json.loads((folder / RESULTS).read_text()),
    }


def run_all(todo: list[Run], jobs: int, start: Callable[[Run, set[int] | None], Record]) -> None:
    """Starts the runs, `jobs` at a time, and adds the record of each to its experiment's file as soon as it is done.

    Args:
      start: (run, CPUs) → record. CPUs are a share of this process's CPUs; None for one job.

    Raises:
      InputError: a run failed. Runs in progress are recorded, the others are not started.
    """
    shares: queue.SimpleQueue[set[int] | None] = queue.SimpleQueue()
    for share in cpu_shares(jobs):
        shares.put(share)
    writing = threading.Lock()

    def one(number: int, run: Run) -> None:
        line = f"run {number} of {len(todo)}: {run.experiment} {run.arm}, seed {run.seed}\n"
        print(line, end="", flush=True)  # in one write: several threads record
        share = shares.get()
        try:
            record = start(run, share)
        finally:
            shares.put(share)
        with writing:  # read again: several grid processes may share the file
            write_json(results_of(run.experiment), {"runs": [*read_records(run.experiment), record]})

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        started = [pool.submit(one, number, run) for number, run in enumerate(todo, 1)]
        done, _ = concurrent.futures.wait(started, return_when=concurrent.futures.FIRST_EXCEPTION)
        pool.shutdown(wait=True, cancel_futures=True)
    for future in done:
        future.result()


def cpu_shares(jobs: int) -> list[set[int] | None]:
    """The CPUs of this process in equal parts; None for each part if there are too few CPUs or they are not known."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if jobs == 1 or len(cpus) < jobs:
        return [None] * jobs
    return [set(cpus[job::jobs]) for job in range(jobs)]


def module_of(experiment: str) -> ModuleType:
    """The `config.py` of an experiment.

    Raises:
      InputError: there is no such file.
    """
    if not (HERE / experiment / "config.py").is_file():
        known = ", ".join(sorted(path.parent.name for path in HERE.glob("*/config.py")))
        raise InputError(f"there is no experiment {experiment!r}; known: {known}")
    return importlib.import_module(f"experiments.{experiment}.config")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _chosen(given: argparse.Namespace) -> list[Run]:
    """The requested runs without a record, one experiment after the other."""
    if given.arms and len(given.experiments) > 1:
        raise InputError("--arms is of one experiment; leave it out, or name one experiment")
    todo = []
    for experiment in given.experiments:
        arms = arms_of(experiment)
        names = given.arms.split(",") if given.arms else list(arms)
        unknown = [name for name in names if name not in arms]
        if unknown:
            raise InputError(f"{experiment} has no arm {unknown[0]!r}; it has {', '.join(arms)}")
        seeds = {name: given.seeds or arms[name] for name in names}
        todo += pending(experiment, read_records(experiment), seeds)
    return todo


def main() -> None:
    """Runs everything that is not recorded yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "experiments", nargs="+", metavar="experiment", help="folders beside this file with a config.py"
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="the parent of the runs' folders")
    parser.add_argument("--arms", default="", help="only these arms, separated by commas")
    parser.add_argument(
        "--jobs", type=_positive, default=1, help="runs at a time; on a CPU, one for each core is fastest"
    )
    parser.add_argument("--seeds", type=int, default=0, help="seeds of each arm, instead of what config.py says")
    given = parser.parse_args()
    try:
        todo = _chosen(given)
        if not todo:
            files = " and ".join(str(results_of(name).relative_to(HERE.parent)) for name in given.experiments)
            print(f"nothing to run: all of it is recorded; to run it again, remove {files}")
        run_all(todo, given.jobs, functools.partial(train, given.workdir.absolute()))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
