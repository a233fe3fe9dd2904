"""A few steps of one stage on one device, on random arrays: clips a second, utilisation, memory.

    python -m experiments.speed.steps --size=l14 --stage=blend --batch=64
    python -m experiments.speed.steps --size=tiny --stage=adapt --batch=4 --steps=3       a trial, on any machine

The model is that of `configs/pretrain.py:<size>`, with random weights. `python -m vlab_jax.compile` compiles the same
step if it gets the same batch (`--config.stage.blend.batch_size=64`) and `--config.dtype`. If the batch does not fit
the device, half of it is tried, and so on; the record has the requested and the used batch.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from configs.pretrain import get_config
from configs.sizes import SIZES
from experiments.speed import program
from experiments.timing import made_with
from vlab_jax.runtime import sharding

WARM_UP = 3  # uncounted steps at the start; with fewer steps, only the last one counts
SHOWN = ("argument", "output", "alias", "temp", "generated_code")  # in the compiler's count of memory


class TooLarge(Exception):
    """A batch does not fit the device."""


def configured(size: str, stage: str, batch: int, dtype: str) -> ConfigDict:
    """`configs/pretrain.py` at a size, with a batch and a type; without questions, since the random batch has none."""
    config = get_config(size)
    config.dtype = dtype
    config.stage[stage].batch_size = batch
    config.stage[stage].objectives.question_answering = 0.0
    return config


def account(compiled: Any) -> dict[str, int]:
    """The compiler's count of a program's memory on the device, in bytes; empty if it gives none."""
    found = compiled.memory_analysis()
    return {} if found is None else {name: getattr(found, f"{name}_size_in_bytes") for name in SHOWN}


def needed(bytes_of: dict[str, int]) -> int:
    """Bytes that a program needs at once; its output reuses the memory of donated arguments."""
    return sum(bytes_of.values()) - 2 * bytes_of.get("alias", 0)


def measured(config: ConfigDict, stage: str, steps: int) -> dict[str, Any]:
    """Runs the steps, and returns their record.

    Raises:
      TooLarge: the batch does not fit.
    """
    made = program.prepared(config, stage, program.one_device())
    (device,) = made.mesh.devices.flat
    limit = (device.memory_stats() or {}).get("bytes_limit")
    began = time.perf_counter()
    try:
        step = made.lower().compile()
        compiled_in, memory = time.perf_counter() - began, account(step)
        if limit is not None and needed(memory) > limit:
            raise TooLarge(f"it needs {needed(memory) / 2**30:.1f} GiB, and {limit / 2**30:.1f} are there")
        seconds, metrics = timed(step, made, steps)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLarge(str(error).splitlines()[0]) from error
    stats = device.memory_stats() or {}  # a CPU has no such statistics
    median = statistics.median(seconds[min(WARM_UP, len(seconds) - 1) :])
    cost = made.stage.cost
    record = {
        **made.run_shapes(),
        "dtype": config.dtype,
        "steps": steps,
        "seconds": median,
        "clips a second": cost.clips / median,
        "model FLOPs": cost.flops,
        "TFLOP/s": cost.flops / median / 1e12,
        "seconds to compile": compiled_in,
        "first and last loss": [metrics[0]["loss"], metrics[-1]["loss"]],
        "steps that were not finite": sum(each["skipped"] for each in metrics),
        "memory by the compiler": {**memory, "needed": needed(memory)},
        "memory of the device": {name: stats[name] for name in ("peak_bytes_in_use", "bytes_limit") if name in stats},
    }
    return record if cost.peak is None else {**record, "MFU": cost.flops / median / cost.peak}


def timed(step: Any, made: program.Program, count: int) -> tuple[list[float], list[dict[str, float]]]:
    """Seconds and metrics of each step, from random weights, with two alternating batches on the device."""
    batches = [sharding.to_global(program.random_batch(made, seed), made.mesh) for seed in range(2)]
    state = made.stage.initial(jax.device_put(program.random_parameters(made), made.stage.shardings.parameters))
    jax.block_until_ready((state, batches))
    seconds, metrics = [], []
    for number in range(count):
        began = time.perf_counter()
        state, found = step(state, batches[number % 2])
        jax.block_until_ready((state, found))
        seconds.append(time.perf_counter() - began)
        metrics.append({name: float(found[name]) for name in ("loss", "skipped")})
        print(f"step {number + 1}: {seconds[-1]:.3f} s, loss {metrics[-1]['loss']:.3f}", file=sys.stderr, flush=True)
    return seconds, metrics


def fitting(size: str, stage: str, batch: int, dtype: str, steps: int) -> dict[str, Any]:
    """`measured` with the batch, or the first of its half, quarter and so on that fits.

    Raises:
      TooLarge: not even one clip fits.
    """
    clips, refused = batch, {}
    while True:
        try:
            record = measured(configured(size, stage, clips, dtype), stage, steps)
            return {"size": size, "stage": stage, "clips requested": batch, "refused": refused, **record, **made_with()}
        except TooLarge as error:
            if clips == 1:
                raise
            refused[clips] = str(error)
            print(f"{clips} clips do not fit: {error}", file=sys.stderr, flush=True)
            clips //= 2


def main() -> None:
    """Prints the record, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="l14", choices=sorted(SIZES), help="a size in configs/sizes.py")
    parser.add_argument("--stage", default="blend", choices=program.STAGES, help="a stage of configs/pretrain.py")
    parser.add_argument("--batch", type=int, default=64, help="maximum clips in a step")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    print(json.dumps(fitting(given.size, given.stage, given.batch, given.dtype, given.steps)))


if __name__ == "__main__":
    main()
