"""The time to lower and compile a step, without and with the compilation cache.

    python -m experiments.speed.compile_time --size=l14
    python -m experiments.speed.compile_time --size=l14 --unroll=24       without a loop over blocks

Two processes run one after the other, with a new cache directory: the first compiles the step, the second finds it in
the cache. Each measures wall and processor seconds from the start of lowering to the compiled step.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time
from typing import Any

from experiments.speed import children, program
from experiments.timing import add_record, made_with

RESULTS = pathlib.Path(__file__).with_name("compile_time.json")


def timed(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of lowering and compiling, in this process."""
    step = program.from_arguments(given, program.one_device())
    found, marks = {}, [(time.perf_counter(), time.process_time())]
    lowered = step.lower()
    marks.append((time.perf_counter(), time.process_time()))
    lowered.compile()
    marks.append((time.perf_counter(), time.process_time()))
    for name, before, after in zip(("lowering", "compiling"), marks, marks[1:], strict=False):
        found[name] = {"seconds": after[0] - before[0], "processor seconds": after[1] - before[1]}
    found["seconds"] = marks[-1][0] - marks[0][0]
    return found


def cold_and_warm(given: argparse.Namespace) -> dict[str, Any]:
    """`timed` in a process that compiles, and in one that finds the compiled step in the cache."""
    names = ("size", "stage", "batch", "frames", "dtype", "remat", "unroll")
    arguments = [f"--{name}={getattr(given, name)}" for name in names] + ["--here"]
    with tempfile.TemporaryDirectory() as folder:
        environment = {"JAX_COMPILATION_CACHE_DIR": folder}
        runs = [children.answer("experiments.speed.compile_time", arguments, environment=environment) for _ in range(2)]
    return {"cold": runs[0], "warm": runs[1], "cold / warm": runs[0]["seconds"] / runs[1]["seconds"]}


def main() -> None:
    """Measures one size and adds it to `compile_time.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    program.add_arguments(parser, size="l14", remat="dots")
    parser.add_argument("--here", action="store_true", help="print the time in this process, and end")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(timed(given)))
        return
    name = f"{given.size}, {given.stage}, remat={given.remat}, unroll={given.unroll}"
    record = {**cold_and_warm(given), "cpus": len(os.sched_getaffinity(0)), **made_with()}
    add_record(RESULTS, name, record)


if __name__ == "__main__":
    main()
