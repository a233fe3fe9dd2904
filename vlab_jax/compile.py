"""Compiles a config's programs for a machine that is not here: do they fit, and how fast would they be?

    python -m vlab_jax.compile --config=configs/pretrain.py:l14 --topology=v5p:2x2x2
    python -m vlab_jax.compile --config=configs/pretrain.py:b16 --topology=h100:8 --config.stages="('blend',)" \\
        --largest_batch

The step of each stage is compiled, on any machine with a CPU; no data set, no weights and no network are needed.
Topologies count chips: v5e:2x4, v5p:2x2x2 and v6e:2x4 are eight TPUs each; h200, a100:8 and h100:2x8 are GPUs (hosts x
GPUs per host). TPUs need libtpu, and GPUs need JAX's plugin for CUDA, each in an environment of its own: pip install -e
'.[compile-tpu]', or '.[compile-gpu]'.

For one device it reports: the bytes of parameters, optimiser, average, batch and temporaries, and whether they fit;
model FLOPs, and their time at the chip's peak; what collectives send; for TPUs the compiler's own estimate of the time
(or a rule's, where it has none: vlab_jax/compiling/step_time.py), where that time goes, and the resulting utilisation.
XLA's compiler for GPUs gives no estimates. Input, hosts and the network between hosts are left out.

A TPU's compiler refuses a program that does not fit. On a GPU, JAX allocates 75 % of the memory, or the share in
XLA_PYTHON_CLIENT_MEM_FRACTION, which this command reads too, and the program must fit that.

Exit status: 0 everything fits; 3 something does not fit; 2 an error in the command or the config; 1 a bug.
"""

import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from vlab_jax import config as configuration
from vlab_jax import config_file
from vlab_jax.compiling import topologies
from vlab_jax.errors import InputError

FLAGS = config_file.program_flags(
    "The training config: a file, and its argument after a colon, as in configs/pretrain.py:l14.",
    {"topology": "The machine, as v5e:2x4, v5p:2x2x2, v6e:2x4, h200, h100:8 or h100:2x8."},
    {
        "use": "Also compile the programs that embed clips and texts and generate captions.",
        "largest_batch": "Find the largest batch of each stage that fits, to a sixteenth, starting from the config's: "
        "at most 7 compiles.",
        "json": "Print a JSON object, in bytes and seconds, instead of a table.",
        "markdown": "Print a row of Markdown for each program instead of a table.",
    },
)
DOES_NOT_FIT = 3


def run(
    config: ConfigDict, topology: topologies.Topology, use: bool = False, search: bool = False
) -> tuple[Any, list[Any]]:
    """Compiles a checked training config's programs for a machine: returns the mesh and a `report.ProgramRow` for each.

    With `use`, also the programs of embedding and captioning; with `search`, the largest batch of each stage that fits.
    Raises `InputError` if the config does not fit the machine's mesh, or the compiler does not know the machine.
    """
    import jax  # here, because it takes seconds, and the environment must be set before

    from vlab_jax.runtime import sharding
    from vlab_jax.training import programs, setup
    from vlab_jax.training.stage import check_stages

    config = configuration.resolved(config)
    mesh = sharding.make_mesh(**config.mesh, devices=topologies.devices(topology))
    check_stages(setup.make_model(config, mesh), setup.read_stages(config), mesh)
    with jax.set_mesh(mesh), jax.default_matmul_precision(config.matmul_precision):
        inference = programs.inference_programs(config, mesh) if use else []
        total, rows = len(config.stages) + len(inference), []
        for name in config.stages:
            step = functools.partial(programs.stage_step, config, name, mesh)
            count = f"[{len(rows) + 1}/{total}]"
            row = _search(step, topology, mesh, count) if search else _compile(step(), topology, mesh, count)
            rows.append(row)
        for program in inference:
            rows.append(_compile(program, topology, mesh, f"[{len(rows) + 1}/{total}]"))
    return mesh, rows


def _compile(program: Any, topology: topologies.Topology, mesh: Any, count: str) -> Any:
    """The `report.ProgramRow` of a `programs.Program`."""
    from vlab_jax.compiling import fitting, hlo, report, step_time
    from vlab_jax.runtime.profiling import peak_flops

    began = time.monotonic()
    _log(f"{count} {program.name}, a batch of {program.batch}: ")
    with topologies.mock_cudnn(capability=topology.chip.capability):
        lowered = program.trace().lower()
    _log(f"lowered in {time.monotonic() - began:.0f} s, ")
    result = fitting.compile_program(lowered, topology, sum(program.held.values()))
    seconds = time.monotonic() - began
    verdict = "fits" if result.fits else "does not fit"
    memory = f"{result.needed / topologies.GIB:.2f} of {result.available / topologies.GIB:.2f} GiB"
    _log(f"compiled after {seconds:.0f} s; it {verdict}: {memory}\n")
    peak, chip = peak_flops(list(mesh.devices.flat)), topology.chip
    counts = hlo.count_program(result.text) if result.text else hlo.ProgramCounts()
    estimate = None
    if result.text and topology.platform == "tpu":
        rates = step_time.Rates(chip.clock, (peak or 0.0) / mesh.size, chip.bandwidth, chip.ring)
        estimate = step_time.estimate_time(result.text, rates)
    return report.ProgramRow(
        name=program.name,
        batch=program.batch,
        memory=result,
        held=program.held,
        flops=None if program.flops is None else program.flops / mesh.size,
        at_peak=program.flops / peak if program.flops and peak else None,
        collectives={
            kind: {"count": float(count), "payload": float(counts.payload[kind]), "sent": counts.sent[kind]}
            for kind, count in counts.count.items()
        },
        sending=counts.total_sent / chip.ring if chip.ring and result.text else None,
        time=estimate,
        compile_seconds=seconds,
    )


def _search(step: Callable[..., Any], topology: topologies.Topology, mesh: Any, count: str) -> Any:
    """The `report.ProgramRow` of a stage's largest batch that fits, or of the smallest that was tried if none fits."""
    from vlab_jax.compiling import fitting

    rows, first = {}, step()

    def attempt(batch: int) -> fitting.CompileResult:
        rows[batch] = _compile(step(batch), topology, mesh, count)
        return rows[batch].memory

    fixed = sum(first.held.values()) - first.held["batch"]
    return rows[fitting.largest_batch(attempt, first.batch, first.unit, fixed) or min(rows)]


def _log(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def _format(arguments: Sequence[str], topology: topologies.Topology, mesh: Any, rows: Sequence[Any]) -> str:
    """The output for the rows, by the flags."""
    from vlab_jax.compiling import report

    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    if FLAGS.json:
        header = {"topology": topology.name, "devices": mesh.size, "mesh": dict(mesh.shape)}
        return json.dumps(header | {"programs": [row.as_json() for row in rows]}, indent=2)
    if FLAGS.markdown:
        config = (config_file.value_of(arguments) or "").rpartition(":")[2]
        command = ["python", "-m", "vlab_jax.compile", *(word for word in arguments if word != "--markdown")]
        return "\n".join(report.markdown(row, config, topology.name, axes, shlex.join(command)) for row in rows)
    kind = mesh.devices.flat[0].device_kind
    return f"{topology.name}: {mesh.size} x {kind}, mesh {axes}\n\n{report.table(rows)}"


def parse(arguments: Sequence[str]) -> topologies.Topology:
    """Parses the command line, and returns the machine; raises `InputError`. The config is not checked yet."""
    try:
        config_file.parse(arguments, FLAGS)
    except InputError as error:
        hint = "; nothing is downloaded here, so name the size, as in configs/pretrain.py:l14"
        raise InputError(f"{error}{hint if 'pretrained=' in ' '.join(arguments) else ''}") from error
    if not FLAGS.topology:
        raise InputError(f"name the machine, as in --topology=v5e:2x4; known chips are {', '.join(topologies.CHIPS)}")
    if FLAGS.config.get("task") != "train":
        raise InputError(
            "compiling needs a config that trains, as configs/pretrain.py; --use also compiles embedding and captioning"
        )
    return topologies.parse(FLAGS.topology)


def main(arguments: Sequence[str]) -> int:
    """The entry point of `python -m vlab_jax.compile`."""
    if config_file.show_help(arguments, __doc__, FLAGS):
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a config may name weights: none are downloaded
    try:
        topology = parse(arguments)
        os.environ.update(topologies.environment(topology))
        from vlab_jax import config_check  # here, because it imports JAX, which reads the environment

        config_check.check(FLAGS.config)
        mesh, rows = run(FLAGS.config, topology, FLAGS.use, FLAGS.largest_batch)
        print(_format(arguments[1:], topology, mesh, rows))
        return 0 if all(row.memory.fits for row in rows) else DOES_NOT_FIT
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv))
