"""Several processes train as one does, and go on with what another number of them began."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from run_files import losses

from vlab_jax.config import model_fields, plain
from vlab_jax.errors import InputError
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.runtime import processes, sharding
from vlab_jax.runtime.checkpoint import Checkpoints
from vlab_jax.training.loop import train

ROOT = pathlib.Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(number: int, count: int, port: int) -> dict[str, str]:
    """Of one process, which has its share of eight devices."""
    flags = re.sub(r"(host_platform_device_count=)\d+", rf"\g<1>{8 // count}", os.environ["XLA_FLAGS"])
    names = (processes.COORDINATOR, processes.COUNT, processes.NUMBER)
    given = dict(zip(names, (f"127.0.0.1:{port}", str(count), str(number)), strict=True))
    return {**os.environ, **given, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}


def together(count: int, arguments: list[str]) -> list[str]:
    """Runs the program in so many processes at once; what each wrote to standard error."""
    port = free_port()
    command = [sys.executable, "-m", "vlab_jax.main", "--multihost", *arguments]
    running = [
        subprocess.Popen(command, cwd=ROOT, env=environment(number, count, port), stderr=subprocess.PIPE, text=True)
        for number in range(count)
    ]
    said = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0] * count, said
    return said


def parameters(config, workdir: pathlib.Path):
    """Those of a run's last checkpoint, wherever they were saved from."""
    shapes = parameter_shapes(VLAB.from_fields(model_fields(plain(config.to_dict()))), config.frames)
    with Checkpoints(workdir / "checkpoints") as saved:
        places = sharding.shardings(shapes, sharding.make_mesh())
        return saved.restore_parameters(saved.latest(), shapes, places, averaged=False)


def test_two_processes_train_as_one_and_each_number_goes_on_with_the_others_checkpoint(
    config, finished, data_dir, tmp_path
):
    """Two processes of four devices for two steps, one of eight for two, and two again to the end."""
    arguments = [
        f"--config={ROOT / 'tests' / 'tiny_run.py'}",
        f"--workdir={tmp_path}",
        f"--config.data.directory={data_dir}",
    ]
    first, second = together(2, [*arguments, "--config.stop_after=2"])
    assert "stage adapt" in first and "adapt" not in second  # one of them speaks
    config.stop_after = 4
    train(config, tmp_path)
    together(2, arguments)
    recorded, expected = losses(tmp_path), losses(finished)
    assert [each[:2] for each in recorded] == [each[:2] for each in expected]
    np.testing.assert_allclose([each[2] for each in recorded], [each[2] for each in expected], rtol=1e-5)
    here, alone = parameters(config, tmp_path), parameters(config, finished)
    for one, other in zip(jax.tree.leaves(here), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=1e-5)
    results, reached = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, finished))
    assert results.keys() == reached.keys()
    assert (tmp_path / "report" / "index.html").is_file()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({processes.COUNT: "2"}, "JAX_NUM_PROCESSES is set, but JAX_COORDINATOR_ADDRESS is not"),
        (
            {processes.COORDINATOR: "localhost:1", processes.COUNT: "2", processes.NUMBER: "2"},
            "JAX_PROCESS_ID=2 must be a number from 0 to JAX_NUM_PROCESSES=2 less 1",
        ),
    ],
)
def test_variables_that_make_no_sense_are_explained_in_one_line(monkeypatch, given, said):
    for name in (processes.COORDINATOR, processes.COUNT, processes.NUMBER):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=re.escape(said)):
        processes.connect()


def test_an_evaluation_is_for_one_process():
    command = [sys.executable, "-m", "vlab_jax.main", "--config=configs/evaluate.py", "--checkpoint=x", "--multihost"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --multihost is for training")
