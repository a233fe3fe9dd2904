"""The saving and the cost of recomputation: memory and FLOPs of a step with `model.remat` none, dots and full.

    python -m experiments.speed.remat --size=b16 --batch=8

The step is compiled for one device and not run. Memory is XLA's count for the compiled program, without parameters,
optimiser state and batch; FLOPs are read from the program (`vlab_jax/compiling/hlo.py`).
"""

import argparse
import json
import pathlib
import sys
from typing import Any

from experiments.speed import program
from experiments.timing import add_record, made_with
from vlab_jax.compiling import hlo

RESULTS = pathlib.Path(__file__).with_name("remat.json")
POLICIES = ("none", "dots", "full")


def cost(given: argparse.Namespace, policy: str) -> dict[str, float]:
    """The memory and the FLOPs of a step with a policy."""
    step = program.from_arguments(argparse.Namespace(**{**vars(given), "remat": policy}), program.one_device())
    compiled = step.lower().compile()
    found = {
        "MiB of temporary memory": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "GFLOP": hlo.count_program(compiled.as_text()).flops / 1e9,
        "GFLOP, without what is computed twice": step.stage.cost.flops / 1e9,
    }
    print(policy, json.dumps(found), file=sys.stderr, flush=True)
    return found


def compared(given: argparse.Namespace) -> dict[str, Any]:
    """The costs of all policies, and their ratios to the first one."""
    found = {policy: cost(given, policy) for policy in POLICIES}
    for policy in found.values():
        for figure in ("MiB of temporary memory", "GFLOP"):
            policy[f"{figure}, of none's"] = policy[figure] / found["none"][figure]
    return found


def main() -> None:
    """Measures one size and adds it to `remat.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    program.add_arguments(parser)
    given = parser.parse_args()
    name = f"{given.size}, {given.stage}, {given.batch} clips of {given.frames} frames, {given.dtype}"
    sizes = {key: value for key, value in vars(given).items() if key != "remat"}
    add_record(RESULTS, name, {**sizes, **compared(given), **made_with()})


if __name__ == "__main__":
    main()
