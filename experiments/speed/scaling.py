"""The cost of a step on each of 1, 2, 4 and 8 devices: FLOPs, memory, and communication.

    python -m experiments.speed.scaling --size=b16
    python -m experiments.speed.scaling --size=tiny --devices 1 2 --meshes fsdp       a trial

The step is compiled for the given number of host devices and not run, so that any machine can measure it; its time is
not measured. *Weak*: each device has `--batch` clips. *Strong*: all devices together have them. Each mesh of `--meshes`
gives all devices to one axis of `config.mesh`. FLOPs and collectives are read from the compiled program
(`vlab_jax/compiling/hlo.py`), memory is XLA's own count. The compiler for CPUs partitions a program like the others do,
but keeps all-reduces that others turn into reduce-scatters, and computes bfloat16 products in float32; so the program
is compiled in float32 here.
"""

import argparse
import json
import pathlib
from typing import Any

import jax

from experiments.speed import children, program
from experiments.timing import add_record, made_with
from vlab_jax.compiling import hlo

RESULTS = pathlib.Path(__file__).with_name("scaling.json")
MESHES = ("data", "fsdp", "tensor")


def cost(given: argparse.Namespace) -> dict[str, Any]:
    """The cost on one device, for a mesh over all devices of this process."""
    axes = {"data": 1, "fsdp": 1, "tensor": 1, given.meshes[0]: jax.device_count()}
    config = program.configured(given.size, given.stage, given.batch, frames=given.frames, remat=given.remat, mesh=axes)
    step = program.prepared(config, given.stage)
    compiled = step.lower().compile()
    found, memory = hlo.count_program(compiled.as_text()), compiled.memory_analysis()
    return {
        "clips of all devices": given.batch,
        "GFLOP": found.flops / 1e9,
        "GFLOP, counted for the whole step": step.stage.cost.flops / 1e9,
        "MiB of state and batch": memory.argument_size_in_bytes / 2**20,
        "MiB of temporary memory": memory.temp_size_in_bytes / 2**20,
        "collectives": dict(found.count),
        "MiB in collectives": {kind: payload / 2**20 for kind, payload in found.payload.items()},
        "MiB sent in a ring": {kind: sent / 2**20 for kind, sent in found.sent.items()},
    }


def measured(given: argparse.Namespace, mesh: str, devices: int, batch: int) -> dict[str, Any]:
    """`cost`, in a process with the given number of devices."""
    names = ("size", "stage", "frames", "remat")
    arguments = [f"--{name}={getattr(given, name)}" for name in names]
    arguments += [f"--batch={batch}", f"--meshes={mesh}", "--here"]
    flags = f"--xla_force_host_platform_device_count={devices} {children.QUICK}"
    return children.answer("experiments.speed.scaling", arguments, flags=flags)


def main() -> None:
    """Measures one size, and adds each mesh to `scaling.json` as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    program.add_arguments(parser, batch=16)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--meshes", nargs="+", default=list(MESHES), choices=MESHES, help="axes that get all devices, in turn"
    )
    parser.add_argument("--here", action="store_true", help="print the cost on the devices of this process, and end")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(cost(given)))
        return
    alone = False
    for mesh in given.meshes:
        for devices in given.devices:
            for kind, batch in (("weak", given.batch * devices), ("strong", given.batch)):
                # One device is the same on every mesh; if the batch is not split, weak scaling is not defined.
                if (devices == 1 and alone) or (mesh == "tensor" and devices > 1 and kind == "weak"):
                    continue
                alone = alone or devices == 1
                name = "one device" if devices == 1 else f"{mesh}={devices}, {kind}"
                record = {**measured(given, mesh, devices, batch), "remat": given.remat, **made_with()}
                add_record(RESULTS, f"{given.size}, {given.stage}, {given.frames} frames: {name}", record)


if __name__ == "__main__":
    main()
