"""A run of seconds, on data that is built once."""

import pathlib

import pytest
import tiny_run
from filelock import FileLock
from ml_collections import ConfigDict

from vlab_jax.training.loop import train


@pytest.fixture
def config(data_dir) -> ConfigDict:
    made = tiny_run.get_config()
    made.data.directory = data_dir
    return made


@pytest.fixture(scope="session")
def finished(data_dir, tmp_path_factory, worker_id) -> pathlib.Path:
    """The workdir of an uninterrupted run, which the processes that test in parallel share."""
    own = tmp_path_factory.getbasetemp()
    folder = own if worker_id == "master" else own.parent
    workdir = folder / "finished"
    with FileLock(folder / "finished.lock"):
        if not (workdir / "report" / "index.html").exists():
            workdir.mkdir(exist_ok=True)
            made = tiny_run.get_config()
            made.data.directory = data_dir
            train(made, workdir)
    return workdir
