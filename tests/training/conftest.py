"""A run of seconds, on data that is built once."""

import pathlib

import numpy as np
import pytest
import tiny_run
from filelock import FileLock
from ml_collections import ConfigDict
from saved_clip import flat, save_clip

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


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """The folder of a saved CLIP of the tiny run's sizes, and its parameters by path."""
    folder = tmp_path_factory.mktemp("clip")
    _, parameters = save_clip(folder, vision=tiny_run.TOWER, text=tiny_run.TEXT)
    (folder / "README.md").write_text("---\ntags: [x]\nlicense: mit\n---\n# A CLIP\n")
    return folder, {p: a for p, a in flat(parameters).items() if p.split("/")[0] in ("vision", "text", "logit_scale")}
