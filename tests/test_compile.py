"""Compiling for a machine that is not here: what is said, and the exit status. The machine is made of CPU devices,
except where libtpu is at hand."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

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


@pytest.fixture
def eight(monkeypatch):
    """Eight CPU devices that pass for GPUs."""
    monkeypatch.setattr(topologies, "devices", lambda topology: jax.devices())
    return topologies.parse("h100:8")


def test_what_a_stage_holds_is_told_byte_by_byte():
    program = programs.stage_step(small_config(), "blend", sharding.make_mesh(data=8))
    assert (program.name, program.batch, program.unit) == ("blend", 16, 8)
    assert set(program.held) == set(HELD)
    frames = 2 * 2 * 24 * 24 * 3  # of the two clips of a device
    captions, questions = 2 * 24 + 2, 2 * 4 * (24 + 2)  # tokens, lengths; of questions, where the answer starts too
    assert program.held["batch"] == frames + 4 * (captions + 2 + questions)
    # Adam keeps two of each parameter that learns; the image encoder does not.
    assert program.held["parameters"] < program.held["optimiser"] < 2 * program.held["parameters"]
    assert program.held["average"] == 0
    averaged = programs.stage_step(
        small_config(**{"stage.blend.average_decay": 0.99}), "blend", sharding.make_mesh(data=8)
    )
    assert averaged.held["average"] > 0


def test_fsdp_splits_what_is_held():
    whole = programs.stage_step(small_config(), "blend", sharding.make_mesh(data=8)).held
    split = programs.stage_step(small_config(), "blend", sharding.make_mesh(data=1, fsdp=8)).held
    assert split["parameters"] < 0.6 * whole["parameters"]
    assert split["batch"] == whole["batch"]


def one_product(config, name, mesh, batch=0):
    """A stage that is one product over clips, whose gradient all devices add up."""
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    clips = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=rows)
    kernel = jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=whole)
    gradient = jax.jit(jax.grad(lambda kernel, clips: (clips @ kernel).sum()), out_shardings=whole)
    held = {"parameters": 32 * 8 * 4, "optimiser": 0, "average": 0, "batch": 2 * 32 * 4}
    return programs.Program(name, 16, 8, held, 8e12, lambda: gradient.trace(kernel, clips))


def test_a_stage_is_compiled_for_the_machine(eight, monkeypatch, capsys):
    monkeypatch.setattr(programs, "stage_step", one_product)
    mesh, (row,) = command.run(small_config(), eight)
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert (row.name, row.batch, row.fits, row.flops) == ("blend", 16, True, 1e12)
    assert row.needed >= row.held["parameters"] + row.held["batch"]
    assert row.collectives["all-reduce"] == {"count": 1.0, "payload": 1024.0, "sent": 2 * 7 / 8 * 1024}
    assert row.time is None and row.utilisation is None  # there is no estimate for GPUs
    progress = capsys.readouterr().err
    assert progress.startswith("[1/1] blend, a batch of 16: ")
    assert progress.count("\n") == 1


def says(needed, available=4 * GIB):
    """A compiler that says so of every program, and is not asked."""
    return lambda lowered, topology, held: fitting.Compiled(
        needed(lowered) <= available, float(needed(lowered)), float(available), float(needed(lowered) - held)
    )


def test_what_a_model_is_used_for_is_lowered_too(eight, monkeypatch):
    monkeypatch.setattr(fitting, "compiled", says(lambda lowered: GIB))
    monkeypatch.setattr(programs, "stage_step", stage_of_one_clip_a_quarter)
    _, rows = command.run(small_config(), eight, use=True)
    assert [row.name for row in rows] == ["blend", "embed clips", "embed texts", "see clips", "write captions"]
    assert [row.batch for row in rows[1:]] == [8, 64, 8, 8]
    assert rows[1].flops > 0 and rows[4].flops is None


def stage_of_one_clip_a_quarter(config, name, mesh, batch=0):
    """A stage whose every clip takes a quarter of a GiB."""
    batch = batch or config.stage[name].batch_size
    traced = types.SimpleNamespace(lower=lambda: batch)
    return programs.Program(name, batch, 8, dict.fromkeys(HELD, 0), 1e12, lambda: traced)


@pytest.fixture
def little_memory(monkeypatch, eight):
    """GPUs of 4 GiB."""
    monkeypatch.setattr(programs, "stage_step", stage_of_one_clip_a_quarter)
    monkeypatch.setattr(fitting, "compiled", says(lambda batch: batch * GIB // 4))
    return eight


def test_the_largest_batch_is_a_multiple_of_what_the_mesh_divides(little_memory):
    _, (row,) = command.run(small_config(**{"stage.blend.batch_size": 64}), little_memory, search=True)
    assert (row.batch, row.fits) == (16, True)


def test_what_does_not_fit_is_exit_status_3(little_memory, monkeypatch, capsys):
    monkeypatch.setattr(topologies, "environment", lambda topology: {})
    arguments = ["vlab_jax.compile", PRETRAIN, "--topology=h100:8", "--config.stages=('blend',)", "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert command.main(arguments) == 3
    said = json.loads(capsys.readouterr().out)
    assert (said["topology"], said["devices"]) == ("h100:8", 8)
    (program,) = said["programs"]
    assert (program["name"], program["batch"], program["fits"]) == ("blend", 48, False)
    assert program["needed"] == 12 * GIB
    assert program["time"] is None


def row(**fields):
    held = dict(zip(HELD, (3 * GIB, 6 * GIB, 0, GIB // 2), strict=True))
    collectives = {"all-reduce": {"count": 5.0, "payload": 2.0**21, "sent": 2.0**20}}
    given = {
        "name": "blend",
        "batch": 128,
        "fits": True,
        "needed": 12.5 * GIB,
        "available": 15.75 * GIB,
        "temporaries": 3.0 * GIB,
        "held": held,
        "flops": 2e13,
        "at_peak": 0.1,
        "collectives": collectives,
        "sending": 0.01,
        "time": None,
        "compile_seconds": 83.0,
    }
    return report.ProgramRow(**given | fields)


def test_the_table_says_what_fits_and_where_time_goes():
    from vlab_jax.compiling.step_time import ModelPlace, Time

    time = Time()
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


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m vlab_jax.compile`, without its plugins unless the environment has them."""
    inherited = {name: value for name, value in os.environ.items() if name != "TPU_LIBRARY_PATH"}
    return subprocess.run(
        [sys.executable, "-m", "vlab_jax.compile", *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((PRETRAIN,), "say for which machine, as in --topology=v5e:2x4"),
        ((PRETRAIN, "--topology=v5e"), "as in v5e:2x2"),
        (("--topology=v5e:2x4",), "say what to run"),
        ((f"{PRETRAIN}:l15", "--topology=h200"), "not 'l15'"),
        ((PRETRAIN, "--topology=h200", "--config.frame=3"), "did you mean"),
        (("--config=configs/evaluate.py", "--topology=h200"), "a config that trains"),
        ((PRETRAIN, "--topology=v5e:2x4"), "is no file"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(arguments, said):
    done = call(*arguments, TPU_LIBRARY_PATH="/nowhere/libtpu.so")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr


def test_help_teaches():
    done = call("--help")
    assert done.returncode == 0
    for word in ("--topology", "--use", "--largest_batch", "--json", "v5p:2x2x2", "Exit status", "compile-tpu"):
        assert word in done.stdout


def libtpu() -> str:
    """The library, if it is there."""
    named = os.environ.get("TPU_LIBRARY_PATH", "")
    found = importlib.util.find_spec("libtpu")
    return named or (str(pathlib.Path(found.origin).with_name("libtpu.so")) if found else "")


@pytest.mark.skipif(not libtpu(), reason="neither is libtpu installed, nor TPU_LIBRARY_PATH set")
def test_a_tpus_compiler_takes_the_step_and_estimates_it():
    small = {"depth": 1, "width": 128, "heads": 2, "mlp_width": 256, "embed_width": 64}
    fields = [f"--config.model.{tower}.{name}={value}" for tower in ("vision", "text") for name, value in small.items()]
    done = call(
        PRETRAIN,
        "--topology=v5e:2x2",
        "--config.stages=('adapt',)",
        "--config.model.unroll=1",
        "--config.model.decoder.cross_attention_every=1",
        *fields,
        "--json",
        TPU_LIBRARY_PATH=libtpu(),
        XLA_FLAGS="",
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    (program,) = said["programs"]
    assert said["devices"] == 4
    assert program["fits"] and program["available"] == 15.75 * GIB
    assert program["time"]["by"]["compiler"] > 0
    assert 0 < program["utilisation"] < 1
    assert {"video stream", "decoder"} <= {place["part"] for place in program["time"]["places"]}
