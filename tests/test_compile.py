"""Compiling for a machine that is not here: the report and the exit status. CPU devices stand for the machine, except
where libtpu is installed."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from absl.testing import flagsaver

from vlab_jax import compile as command
from vlab_jax import config_file
from vlab_jax.compiling import fitting, report, topologies
from vlab_jax.compiling.report import HELD
from vlab_jax.runtime import sharding
from vlab_jax.training import programs

ROOT = pathlib.Path(__file__).parents[1]
PRETRAIN = f"--config={ROOT / 'configs' / 'pretrain.py'}"
GIB = 2**30


def small_config(**fields):
    """The tiny config with one stage, and towers of one block."""
    config = config_file.load(str(ROOT / "configs" / "pretrain.py"))
    config.stages = ("blend",)
    config.stage.blend.batch_size = 16
    config.evaluation.batch_size = 4
    config.model.unroll = 1
    for tower in ("vision", "text"):
        config.model[tower].update({"width": 32, "heads": 2, "depth": 1, "mlp_width": 64, "embed_width": 32})
    config.model.vision.update({"image_size": 24})
    config.model.adapter.update({"width": 16, "heads": 2})
    config.model.decoder.cross_attention_every = 1
    config.frames = config.image_frames = 2
    config.update_from_flattened_dict(fields)
    return config


@pytest.fixture(autouse=True)
def clean_flags_and_environment():
    """Undoes what the command sets in this process."""
    saved = flagsaver.save_flag_values(command.FLAGS)
    with mock.patch.dict(os.environ):
        yield
    flagsaver.restore_flag_values(saved, command.FLAGS)


def main(*arguments: str) -> int:
    """The exit status of the command, run in this process."""
    with mock.patch.object(sys, "argv", ["vlab_jax.compile", *arguments]):
        return command.main(sys.argv)


@pytest.fixture
def eight(monkeypatch):
    """Eight CPU devices in the place of GPUs."""
    monkeypatch.setattr(topologies, "devices", lambda topology: jax.devices())
    return topologies.parse("h100:8")


@pytest.mark.eight_devices
def test_the_bytes_of_a_stage_are_those_of_its_shapes():
    program = programs.stage_step(small_config(), "blend", sharding.make_mesh(data=8))
    assert (program.name, program.batch, program.unit) == ("blend", 16, 8)
    assert set(program.held) == set(HELD)
    frames = 2 * 2 * 24 * 24 * 3  # two clips per device
    captions, questions = 2 * 24 + 2, 2 * 4 * (24 + 2)  # tokens and lengths; questions also have an answer's start
    assert program.held["batch"] == frames + 4 * (captions + 2 + questions)
    # Adam keeps two values per trainable parameter; the image encoder is frozen.
    assert program.held["parameters"] < program.held["optimiser"] < 2 * program.held["parameters"]
    assert program.held["average"] == 0
    averaged = programs.stage_step(
        small_config(**{"stage.blend.average_decay": 0.99}), "blend", sharding.make_mesh(data=8)
    )
    assert averaged.held["average"] > 0


@pytest.mark.eight_devices
def test_fsdp_splits_parameters_and_not_the_batch():
    whole = programs.stage_step(small_config(), "blend", sharding.make_mesh(data=8)).held
    split = programs.stage_step(small_config(), "blend", sharding.make_mesh(data=1, fsdp=8)).held
    assert split["parameters"] < 0.6 * whole["parameters"]
    assert split["batch"] == whole["batch"]


def one_product(config, name, mesh, batch=0):
    """A stage with one product over clips, whose gradient is summed over all devices."""
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    clips = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=rows)
    kernel = jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=whole)
    gradient = jax.jit(jax.grad(lambda kernel, clips: (clips @ kernel).sum()), out_shardings=whole)
    held = {"parameters": 32 * 8 * 4, "optimiser": 0, "average": 0, "batch": 2 * 32 * 4}
    return programs.Program(name, 16, 8, held, 8e12, lambda: gradient.trace(kernel, clips))


@pytest.mark.eight_devices
def test_a_stage_is_compiled_for_the_machine(eight, monkeypatch, capsys):
    monkeypatch.setattr(programs, "stage_step", one_product)
    mesh, (row,) = command.run(small_config(), eight)
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert (row.name, row.batch, row.memory.fits, row.flops) == ("blend", 16, True, 1e12)
    assert row.memory.needed >= row.held["parameters"] + row.held["batch"]
    assert row.collectives["all-reduce"] == {"count": 1.0, "payload": 1024.0, "sent": 2 * 7 / 8 * 1024}
    assert row.time is None and row.utilisation is None  # there is no estimate for GPUs
    progress = capsys.readouterr().err
    assert progress.startswith("[1/1] blend, a batch of 16: ")
    assert progress.count("\n") == 1


def fake_compiler(needed, available=4 * GIB):
    """A compiler that finds this need of memory in a lowered program, without compiling it."""
    return lambda lowered, topology, held: fitting.CompileResult(
        needed(lowered) <= available, float(needed(lowered)), float(available), float(needed(lowered) - held)
    )


@pytest.mark.eight_devices
def test_the_programs_of_embedding_and_captioning_are_lowered_too(eight, monkeypatch):
    monkeypatch.setattr(fitting, "compile_program", fake_compiler(lambda lowered: GIB))
    monkeypatch.setattr(programs, "stage_step", stage_of_one_clip_a_quarter)
    _, rows = command.run(small_config(), eight, use=True)
    assert [row.name for row in rows] == ["blend", "embed clips", "embed texts", "encode clips", "generate captions"]
    assert [row.batch for row in rows[1:]] == [8, 64, 8, 8]
    assert rows[1].flops > 0 and rows[4].flops is None


def stage_of_one_clip_a_quarter(config, name, mesh, batch=0):
    """A stage that takes a quarter of a GiB per clip."""
    batch = batch or config.stage[name].batch_size
    traced = types.SimpleNamespace(lower=lambda: batch)
    return programs.Program(name, batch, 8, dict.fromkeys(HELD, 0), 1e12, lambda: traced)


@pytest.fixture
def little_memory(monkeypatch, eight):
    """GPUs of 4 GiB."""
    monkeypatch.setattr(programs, "stage_step", stage_of_one_clip_a_quarter)
    monkeypatch.setattr(fitting, "compile_program", fake_compiler(lambda batch: batch * GIB // 4))
    return eight


def test_the_largest_batch_is_a_multiple_of_the_devices(little_memory):
    _, (row,) = command.run(small_config(**{"stage.blend.batch_size": 64}), little_memory, search=True)
    assert (row.batch, row.memory.fits) == (16, True)


@pytest.mark.eight_devices
def test_what_does_not_fit_is_exit_status_3(little_memory, monkeypatch, capsys):
    monkeypatch.setattr(topologies, "environment", lambda topology: {})
    assert main(PRETRAIN, "--topology=h100:8", "--config.stages=('blend',)", "--json") == 3
    output = json.loads(capsys.readouterr().out)
    assert (output["topology"], output["devices"]) == ("h100:8", 8)
    (program,) = output["programs"]
    assert (program["name"], program["batch"], program["fits"]) == ("blend", 48, False)
    assert program["needed"] == 12 * GIB
    assert program["time"] is None


def row(fits=True, **fields):
    held = dict(zip(HELD, (3 * GIB, 6 * GIB, 0, GIB // 2), strict=True))
    collectives = {"all-reduce": {"count": 5.0, "payload": 2.0**21, "sent": 2.0**20}}
    given = {
        "name": "blend",
        "batch": 128,
        "memory": fitting.CompileResult(fits, 12.5 * GIB, 15.75 * GIB, 3.0 * GIB),
        "held": held,
        "flops": 2e13,
        "at_peak": 0.1,
        "collectives": collectives,
        "sending": 0.01,
        "time": None,
        "compile_seconds": 83.0,
    }
    return report.ProgramRow(**given | fields)


def test_the_table_has_what_fits_and_where_time_goes():
    from vlab_jax.compiling.step_time import ModelPlace, TimeEstimate

    time = TimeEstimate()
    time.places[ModelPlace("decoder", "MLP", "backward")] = 0.4
    time.sources.update({"compiler": 0.3, "kernels": 0.1})
    shown = report.table([row(time=time), row(name="adapt", fits=False)])
    lines = {line[:22].strip(): line[22:].split() for line in shown.splitlines()}
    assert lines["fits"] == ["yes", "NO"]
    assert lines["utilisation, %"] == ["25.0", "-"]
    assert lines["optimiser"] == ["6.00", "6.00"]
    assert "100 %  decoder, MLP, backward" in shown
    assert "by compiler 300.0, kernels 100.0" in shown


def test_a_row_of_markdown_has_its_command():
    text = report.markdown(row(fits=False), "l14", "v5e:2x4", "data=8", "python -m vlab_jax.compile …")
    cells = [cell.strip() for cell in text.strip("|").split("|")]
    assert cells[:5] == ["l14", "blend", "v5e:2x4", "data=8", "128"]
    assert cells[5] == "**no**: 12.50 of 15.75"
    assert cells[-1] == "`python -m vlab_jax.compile …`"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PRETRAIN,), "name the machine, as in --topology=v5e:2x4"),
        ((PRETRAIN, "--topology=v5e"), "as in v5e:2x2"),
        (("--topology=v5e:2x4",), "name a config"),
        ((f"{PRETRAIN}:l15", "--topology=h200"), "not 'l15'"),
        ((PRETRAIN, "--topology=h200", "--config.frame=3"), 'Did you mean "frames"'),
        ((f"--config={ROOT / 'configs' / 'evaluate.py'}", "--topology=h200"), "a config that trains"),
        ((PRETRAIN, "--topology=v5e:2x4"), "is not a file"),
        # The environment comes first: checking the config imports JAX.
        ((PRETRAIN, "--topology=v5e:2x4", "--config.model.adapter.mixer=x"), "is not a file"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/nowhere/libtpu.so")
    assert main(*arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert message in errors


def test_help_has_all_flags_and_the_exit_status(capsys):
    assert main("--help") == 0
    output = capsys.readouterr().out
    for word in ("--topology", "--use", "--largest_batch", "--json", "v5p:2x2x2", "Exit status", "compile-tpu"):
        assert word in output


def libtpu() -> str:
    """The library's path, or an empty string."""
    named = os.environ.get("TPU_LIBRARY_PATH", "")
    found = importlib.util.find_spec("libtpu")
    return named or (str(pathlib.Path(found.origin).with_name("libtpu.so")) if found else "")


@pytest.mark.skipif(not libtpu(), reason="neither is libtpu installed, nor TPU_LIBRARY_PATH set")
def test_a_tpus_compiler_takes_the_step_and_estimates_it():
    small = {"depth": 1, "width": 128, "heads": 2, "mlp_width": 256, "embed_width": 64}
    fields = [f"--config.model.{tower}.{name}={value}" for tower in ("vision", "text") for name, value in small.items()]
    command_line = [
        *(sys.executable, "-m", "vlab_jax.compile", PRETRAIN),
        "--topology=v5e:2x2",
        "--config.stages=('adapt',)",
        "--config.model.unroll=1",
        "--config.model.decoder.cross_attention_every=1",
        *fields,
        "--json",
    ]
    environment = {**os.environ, "TPU_LIBRARY_PATH": libtpu(), "XLA_FLAGS": ""}
    done = subprocess.run(command_line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)
    (program,) = output["programs"]
    assert output["devices"] == 4
    assert program["fits"] and program["available"] == 15.75 * GIB
    assert program["time"]["by"]["compiler"] > 0
    assert 0 < program["utilisation"] < 1
    assert {"video stream", "decoder"} <= {place["part"] for place in program["time"]["places"]}
