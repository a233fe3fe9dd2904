"""What commit 744fb30 saved still works: an export, a search index, a finished run and one that was stopped.

`tests/saved_by_744fb30` holds these files, the figures that the commit computed from them, and the program that made
both.
"""

import json
import pathlib
import tarfile
from typing import Any

import numpy as np
import pytest
from run_files import losses
from saved_by_744fb30 import make

from vlab_jax import predict
from vlab_jax.datasets import registry
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.training.loop import train

FIGURES = json.loads(make.FIGURES.read_text())
# Texts, ranks and spans are equal. Numbers are equal in all but the last digits of float32, since another version of
# JAX adds in another order.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("saved")
    with tarfile.open(make.ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def same_clips(saved, data_dir) -> str:
    """The folder of `motion/tiny`, if it has the bytes that it had then: other libraries may encode it otherwise."""
    source = registry.open_split("motion/tiny", "test", BuildOptions(data_dir))
    if any(source[number]["media"] != (saved / "media" / f"{number}.mp4").read_bytes() for number in range(3)):
        pytest.skip("the libraries here encode `motion` to other bytes")
    return data_dir


def assert_equal(ours: Any, theirs: Any) -> None:
    """Compares nested lists and dictionaries, numbers within the tolerance."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), [theirs[key] for key in ours]
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    elif isinstance(theirs, float):
        np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    else:
        assert ours == theirs


@pytest.mark.parametrize("model", ["export", "finished"])
def test_a_model_embeds_captions_and_answers_as_before(model, saved):
    assert_equal(make.model_figures(saved / model), FIGURES["model"])


def test_an_index_has_the_hits_and_scores_of_before(saved):
    assert_equal(make.hits(saved / "index", saved / "export", saved / "media"), FIGURES["hits"])


def test_an_index_is_up_to_date_at_another_place(saved, capsys):
    index = ["index", str(saved / "media"), f"--index={saved / 'index'}", f"--model={saved / 'export'}", "--workers=0"]
    assert predict.main([*index, "--moved"]) == 0
    assert "files: 3 touched; windows embedded: 0;" in capsys.readouterr().out


def test_a_finished_run_is_evaluated_to_the_figures_of_before(saved, same_clips):
    assert_equal(make.evaluation_figures(saved / "finished", same_clips), FIGURES["evaluation"])


@pytest.mark.long
def test_a_stopped_run_goes_on_with_equal_losses(saved, same_clips):
    config = make.run_config(same_clips)
    config.log_every = 1
    for stage in config.stages:
        config.stage[stage].unused = "decay"  # configs had no such field
    config.stop_after = make.STEPS - 1
    train(config, saved / "stopped")
    ours, theirs = losses(saved / "stopped"), losses(saved / "finished")[:-1]
    assert ours[-1][0] == config.stop_after
    assert_equal([list(row) for row in ours], [list(row) for row in theirs])
