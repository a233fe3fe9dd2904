"""A run of seconds, on data that is built once."""

import pathlib

import pytest
import tiny_run
from ml_collections import ConfigDict

from vlab_jax.training.loop import train


@pytest.fixture
def config(data_dir) -> ConfigDict:
    made = tiny_run.get_config()
    made.data.directory = data_dir
    return made


@pytest.fixture(scope="session")
def finished(data_dir, tmp_path_factory) -> pathlib.Path:
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("finished")
    made = tiny_run.get_config()
    made.data.directory = data_dir
    train(made, workdir)
    return workdir
