"""Several processes train as one does, and go on with what another number of them began."""

import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_files import losses
from saved_clip import flat
from several_processes import OUTAGE, ROOT, together

from vlab_jax.config import model_fields, plain
from vlab_jax.errors import InputError
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.runtime import sharding
from vlab_jax.runtime.checkpoint import PROGRESS, Checkpoints
from vlab_jax.training.loop import train

CONFIG = ROOT / "tests" / "tiny_run.py"


def run_together(count: int, arguments: list[str]) -> list[str]:
    """Runs the program in so many processes at once; what each wrote to standard error."""
    command = [sys.executable, "-m", "vlab_jax.main", "--multihost", *arguments]
    ended = together([command] * count, devices=8 // count)
    assert [each.status for each in ended] == [0] * count, ended
    return [each.said for each in ended]


def noting(folder: pathlib.Path, number: int, *arguments: str, failing: int = -1, batch: int = 0) -> list[str]:
    """The command of a process that notes the clips it reads in `<folder>/read-<number>`."""
    program = [sys.executable, str(ROOT / "tests" / "several_processes.py")]
    return [*program, str(folder / f"read-{number}"), str(failing), str(batch), *arguments]


def noted(folder: pathlib.Path, number: int) -> set[int]:
    """The clips that such a process has read."""
    return set(map(int, (folder / f"read-{number}").read_text().split()))


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
        f"--config={CONFIG}",
        f"--workdir={tmp_path}",
        f"--config.data.directory={data_dir}",
    ]
    first, second = run_together(2, [*arguments, "--config.stop_after=2"])
    assert "stage adapt" in first and "adapt" not in second  # one of them speaks
    config.stop_after = 4
    train(config, tmp_path)
    run_together(2, arguments)
    recorded, expected = losses(tmp_path), losses(finished)
    assert [each[:2] for each in recorded] == [each[:2] for each in expected]
    np.testing.assert_allclose([each[2] for each in recorded], [each[2] for each in expected], rtol=1e-5)
    here, alone = parameters(config, tmp_path), parameters(config, finished)
    for one, other in zip(jax.tree.leaves(here), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=1e-5)
    results, reached = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, finished))
    assert results.keys() == reached.keys()
    assert (tmp_path / "report" / "index.html").is_file()


def test_frozen_parameters_split_over_two_processes_are_saved_as_one_process_saves_them(config, data_dir, tmp_path):
    """In bfloat16, each kernel split in eight: checkpoints have the float32 values of frozen parameters, to the bit,
    also those of a resumed run."""
    config.stop_after, config.dtype, config.mesh.data, config.mesh.fsdp = 1, "bfloat16", 1, 8
    one, two = tmp_path / "one", tmp_path / "two"
    train(config, one)
    expected = flat(parameters(config, one))
    kernels = [path for path in expected if path.startswith("vision/") and path.endswith("kernel")]
    assert kernels
    given = ["dtype=bfloat16", "mesh.data=1", "mesh.fsdp=8", f"data.directory={data_dir}"]
    arguments = [f"--config={CONFIG}", f"--workdir={two}", *(f"--config.{each}" for each in given)]
    for steps in (1, 2):
        run_together(2, [*arguments, f"--config.stop_after={steps}"])
        found = flat(parameters(config, two))
        assert losses(two)[-1][0] == steps
        for path in kernels:
            np.testing.assert_array_equal(found[path], expected[path], err_msg=path)
            assert np.any(found[path] != found[path].astype(jnp.bfloat16)), path


def test_data_out_of_reach_of_one_process_ends_both_and_what_was_saved_stays(data_dir, tmp_path):
    """The first process is in the fourth step by then, where it waits for the other's share of the batch."""
    given = ["--multihost", f"--config={CONFIG}", f"--workdir={tmp_path}", f"--config.data.directory={data_dir}"]
    ended = together([noting(tmp_path, number, *given, failing=1, batch=4) for number in range(2)])
    assert [each.status for each in ended] == [6, 6], ended
    assert f"error: {OUTAGE} (process 1 of 2, counted from 0)" in ended[0].said.splitlines()
    assert f"error: {OUTAGE}" in ended[1].said.splitlines()
    with Checkpoints(tmp_path / "checkpoints") as saved:
        assert saved.latest() == 2
        assert saved.read_json(2, PROGRESS)["seen"] == 2 * 8  # of both processes


def test_two_processes_evaluate_half_of_the_clips_each_and_find_what_one_does(finished, data_dir, tmp_path):
    """All of it has four devices, so that not even the last bits may differ."""
    one, two = tmp_path / "one", tmp_path / "two"
    given = [
        "--config=configs/evaluate.py",
        f"--checkpoint={finished}",
        f"--config.data.directory={data_dir}",
        "--config.data.workers=0",
        "--config.batch_size=4",
        "--config.tasks=('retrieval', 'captioning', 'question_answering')",
        "--config.rerank=3",
        "--config.closed_list=5",
        "--config.query_normalisation=('dual_softmax', 'querybank')",
        "--config.generation.max_tokens=4",
        "--config.report.queries=1",
    ]
    one.mkdir()
    two.mkdir()
    alone = together([noting(one, 0, *given, f"--workdir={one}")])
    shared = together([noting(two, number, *given, f"--workdir={two}", "--multihost") for number in range(2)])
    assert [each.status for each in (*alone, *shared)] == [0] * 3, (alone, shared)
    expected, found = (json.loads((folder / "results.json").read_text()) for folder in (one, two))
    assert found == expected and len(found) == 4
    assert {"text_to_video/R@1", "CIDEr", "QA all", "QA ranked"} <= set(next(iter(found.values())))
    for name in ("predictions.json", "references.json", "questions.jsonl"):
        assert (two / "texts" / name).read_text() == (one / "texts" / name).read_text()
    assert (two / "report" / "index.html").is_file()
    batches = [set(range(first, first + 4)) for first in (0, 4, 8, 12)]
    assert noted(one, 0) == set().union(*batches)
    assert [noted(two, 0), noted(two, 1)] == [batches[0] | batches[2], batches[1] | batches[3]]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({sharding.COUNT: "2"}, "JAX_NUM_PROCESSES is set, but JAX_COORDINATOR_ADDRESS is not"),
        (
            {sharding.COORDINATOR: "localhost:1", sharding.COUNT: "2", sharding.NUMBER: "2"},
            "JAX_PROCESS_ID=2 must be a number from 0 to JAX_NUM_PROCESSES=2 less 1",
        ),
    ],
)
def test_variables_that_make_no_sense_are_explained_in_one_line(monkeypatch, given, said):
    for name in (sharding.COORDINATOR, sharding.COUNT, sharding.NUMBER):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=re.escape(said)):
        sharding.connect()
