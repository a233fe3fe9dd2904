"""Compiles what a config runs for a machine that is not here: does it fit, and how fast would it be?

    python -m vlab_jax.compile --config=configs/pretrain.py:l14 --topology=v5p:2x2x2
    python -m vlab_jax.compile --config=configs/pretrain.py:b16 --topology=h100:8 --config.stages="('blend',)" \\
        --largest_batch

The step of each stage is compiled, on any machine with a CPU; no data set, no weights and no network are needed. The
fields of the config are set as in training. Topologies count chips: v5e:2x4, v5p:2x2x2 and v6e:2x4 are eight TPUs each;
h200, h100:8 and h100:2x8 are GPUs (hosts x GPUs of each), and so is a100:8. For TPUs libtpu is needed, for GPUs JAX's
plugin for CUDA, each in an environment of its own: pip install -e '.[compile-tpu]', or '.[compile-gpu]'.

What it says, of one device: the bytes of parameters, optimiser, average, batch and temporaries, and whether they fit;
model FLOPs (vlab_jax/models/flops.py), and their time at the chip's peak; what collectives send; for TPUs the
compiler's own estimate of the time, where it goes, and the utilisation that follows. Where the compiler gives no
estimate, as for kernels written by hand, a rule charges it (vlab_jax/compiling/step_time.py). For GPUs no time is
estimated: XLA's compiler for them says none. An estimate is none of input, hosts or network between them.

A TPU's compiler refuses what does not fit. On a GPU, JAX takes 75 % of the memory, or as much as
XLA_PYTHON_CLIENT_MEM_FRACTION says, which this command reads too, and the program must fit that.

Exit status: 0 everything fits; 3 something does not; 2 something to mend in the command or the config; 1 a fault.
"""

import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from vlab_jax import config as configuration
from vlab_jax import config_check, config_file
from vlab_jax.compiling import topologies
from vlab_jax.errors import InputError

FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file(
    config_file.FLAG,
    None,
    "What would be trained: a file, and after a colon its argument, as in configs/pretrain.py:l14.",
    flag_values=FLAGS,
)
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "The machine, as v5e:2x4, v5p:2x2x2, v6e:2x4, h200, h100:8 or h100:2x8.", flag_values=FLAGS
)
USE = flags.DEFINE_bool(
    "use", False, "Compile, too, what embedding clips and texts and writing captions run.", flag_values=FLAGS
)
LARGEST = flags.DEFINE_bool(
    "largest_batch",
    False,
    "Find the largest batch of each stage that fits, to a sixteenth, from the config's on: seven compiles at most.",
    flag_values=FLAGS,
)
JSON = flags.DEFINE_bool(
    "json", False, "Print a JSON object, in bytes and seconds, instead of a table.", flag_values=FLAGS
)
MARKDOWN = flags.DEFINE_bool(
    "markdown", False, "Print a row of Markdown for each program instead of a table.", flag_values=FLAGS
)
UNFIT = 3


def run(
    config: ConfigDict, topology: topologies.Topology, use: bool = False, search: bool = False
) -> tuple[Any, list[Any]]:
    """Compiles a config's programs for a machine.

    Args:
      config: of training, checked.
      use: whether what embedding and captioning run is compiled, too.
      search: whether the largest batch of each stage is looked for.

    Returns:
      The mesh, and a `compile_report.ProgramRow` for each program.

    Raises:
      InputError: the config does not fit the machine's mesh, or the machine is none that can be compiled for.
    """
    import jax  # here, because all this takes seconds, and the environment must be set before

    from vlab_jax.runtime import sharding
    from vlab_jax.training import programs
    from vlab_jax.training import stage as stages

    config = configuration.resolved(config)
    mesh = sharding.make_mesh(**config.mesh, devices=topologies.devices(topology))
    stages.check(programs.model_of(config, mesh), config, mesh)
    with jax.set_mesh(mesh), jax.default_matmul_precision(config.matmul_precision):
        used = programs.uses(config, mesh) if use else []
        total, rows = len(config.stages) + len(used), []
        for name in config.stages:
            step = functools.partial(programs.stage_step, config, name, mesh)
            place = f"[{len(rows) + 1}/{total}]"
            row = _largest(step, topology, mesh, place) if search else _compiled(step(), topology, mesh, place)
            rows.append(row)
        for program in used:
            rows.append(_compiled(program, topology, mesh, f"[{len(rows) + 1}/{total}]"))
    return mesh, rows


def _show(given: Sequence[str], topology: topologies.Topology, mesh: Any, rows: Sequence[Any]) -> str:
    """What is printed of the rows, by the flags of the command line `given`."""
    from vlab_jax.compiling import report

    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    if JSON.value:
        about = {"topology": topology.name, "devices": mesh.size, "mesh": dict(mesh.shape)}
        return json.dumps(about | {"programs": [row.as_json() for row in rows]}, indent=2)
    if MARKDOWN.value:
        what = (config_file.value_of(given) or "").rpartition(":")[2]
        command = shlex.join(["python", "-m", "vlab_jax.compile", *(word for word in given if word != "--markdown")])
        return "\n".join(report.markdown(row, what, topology.name, axes, command) for row in rows)
    kind = mesh.devices.flat[0].device_kind
    return f"{topology.name}: {mesh.size} x {kind}, mesh {axes}\n\n{report.table(rows)}"


def _compiled(made: Any, topology: topologies.Topology, mesh: Any, place: str) -> Any:
    """The `ProgramRow` of a `programs.Program`."""
    from vlab_jax.compiling import fitting, hlo, report, step_time
    from vlab_jax.compiling.topologies import cudnn_answers
    from vlab_jax.runtime.profiling import peak_flops

    began = time.monotonic()
    _say(f"{place} {made.name}, a batch of {made.batch}: ")
    with cudnn_answers(capability=topology.capability):
        lowered = made.trace().lower()
    _say(f"lowered in {time.monotonic() - began:.0f} s, ")
    found = fitting.compiled(lowered, topology, sum(made.held.values()))
    spent = time.monotonic() - began
    verdict = "fits" if found.fits else "does not fit"
    needs = f"{found.needed / topologies.GIB:.2f} of {found.available / topologies.GIB:.2f} GiB"
    _say(f"compiled after {spent:.0f} s; it {verdict}: {needs}\n")
    peak, chip, work, estimate = peak_flops(list(mesh.devices.flat)), topology.chip, hlo.ProgramCounts(), None
    if found.text:
        work = hlo.work(found.text)
    if found.text and topology.platform == "tpu":
        rates = step_time.Rates(chip.clock, (peak or 0.0) / mesh.size, chip.bandwidth, chip.ring)
        estimate = step_time.estimate(found.text, rates)
    return report.ProgramRow(
        made.name,
        made.batch,
        found.fits,
        found.needed,
        found.available,
        found.temporaries,
        made.held,
        None if made.flops is None else made.flops / mesh.size,
        made.flops / peak if made.flops and peak else None,
        {
            kind: {"count": float(work.count[kind]), "payload": float(work.payload[kind]), "sent": work.sent[kind]}
            for kind in work.count
        },
        work.total_sent / chip.ring if chip.ring and found.text else None,
        estimate,
        spent,
    )


def _largest(step: Callable[..., Any], topology: topologies.Topology, mesh: Any, place: str) -> Any:
    """The `ProgramRow` of the largest batch of a stage that fits, or of the smallest that was tried where none does."""
    from vlab_jax.compiling import fitting

    tried, first = {}, step()

    def attempt(batch: int) -> Any:
        tried[batch] = _compiled(step(batch), topology, mesh, place)
        return tried[batch]

    size = fitting.largest(attempt, first.batch, first.unit, lambda row: sum(row.held.values()) - row.held["batch"])
    return tried[size or min(tried)]


def _say(words: str) -> None:
    print(words, end="", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str]) -> topologies.Topology:
    """Parses the command line; the machine that it names.

    Raises:
      InputError: what is wrong with it.
    """
    try:
        config_file.parse(arguments, FLAGS, CONFIG)
    except InputError as error:
        hint = "; nothing is fetched here, so name the size, as in configs/pretrain.py:l14"
        raise InputError(f"{error}{hint if 'pretrained=' in ' '.join(arguments) else ''}") from error
    if not TOPOLOGY.value:
        raise InputError(f"say for which machine, as in --topology=v5e:2x4; known are {', '.join(topologies.CHIPS)}")
    config_check.check(CONFIG.value)
    if CONFIG.value.task != "train":
        raise InputError(
            "compiling is for a config that trains, as configs/pretrain.py; with --use also for what it is used for"
        )
    return topologies.parse(TOPOLOGY.value)


def main(arguments: Sequence[str]) -> int:
    """The entry point of `python -m vlab_jax.compile`."""
    if any(argument in config_file.HELP for argument in arguments[1:]) or not arguments[1:]:
        print(config_file.described(__doc__, (CONFIG, TOPOLOGY, USE, LARGEST, JSON, MARKDOWN), FLAGS))
    if any(argument in config_file.HELP for argument in arguments[1:]):
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a config may look for weights: none are fetched
    try:
        topology = parse(arguments)
        os.environ.update(topologies.environment(topology))
        mesh, rows = run(CONFIG.value, topology, USE.value, LARGEST.value)
        print(_show(arguments[1:], topology, mesh, rows))
        return 0 if all(row.fits for row in rows) else UNFIT
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv))
