"""Two processes train and evaluate as one does, and each number of them goes on with the other's checkpoint."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_files import interrupted, losses, results_of, saved_state
from saved_clip import flat
from several_processes import OUTAGE, ROOT, Ended, Job, run_jobs

from vlab_jax import config_file, main
from vlab_jax.data.batches import ClipReader
from vlab_jax.errors import InputError
from vlab_jax.models.vlab import parameter_shapes
from vlab_jax.runtime import sharding
from vlab_jax.runtime.checkpoint import PROGRESS, Checkpoints
from vlab_jax.training.loop import train
from vlab_jax.training.setup import make_model

pytestmark = pytest.mark.long

CONFIG, EVALUATE = str(ROOT / "tests" / "tiny_run.py"), str(ROOT / "configs" / "evaluate.py")
SPLIT = {"mesh.data": 1, "mesh.fsdp": 2}
EVALUATION = {
    "data.workers": 0,
    "batch_size": 4,
    "tasks": ("retrieval", "captioning", "question_answering"),
    "rerank": 3,
    "closed_list": 5,
    "query_normalisation": ("dual_softmax", "querybank"),
    "generation.max_tokens": 4,
    "report.queries": 1,
}


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def ended(finished, folder, data_dir) -> list[Ended]:
    """Two processes of one device that have done all of these jobs, each in a workdir below `folder`."""
    data = {"data.directory": data_dir}
    interrupted(finished, folder / "run", 6)
    interrupted(finished, folder / "failed", 4)
    (folder / "evaluation").mkdir()
    frozen = str(folder / "frozen")
    jobs = [
        Job(CONFIG, data, str(folder / "run")),
        Job(CONFIG, {**data, **SPLIT, "dtype": "bfloat16", "stop_after": 1}, frozen),
        Job(CONFIG, {**data, **SPLIT, "dtype": "bfloat16", "stop_after": 2}, frozen),
        Job(EVALUATE, {**data, **EVALUATION}, str(folder / "evaluation"), str(finished), str(folder / "clips")),
        # The other process is in its fourth step by then, and waits for this one's share of the batch.
        Job(CONFIG, data, str(folder / "failed"), fails=(1, 4)),
    ]
    return run_jobs(jobs, folder, 2)


def test_two_processes_go_on_with_one_process_s_run_and_end_it_as_one_does(ended, folder, finished):
    first, second = ended
    assert "stage blend" in first.stderr and "blend" not in second.stderr  # only one of them logs
    workdir = folder / "run"
    recorded, expected = losses(workdir), losses(finished)
    assert [row[:2] for row in recorded] == [row[:2] for row in expected]
    np.testing.assert_allclose([row[2] for row in recorded], [row[2] for row in expected], rtol=1e-5)
    one, other = saved_state(workdir, 8), saved_state(finished, 8)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-5, err_msg=name)
    assert results_of(workdir).keys() == results_of(finished).keys()
    assert (workdir / "report" / "index.html").is_file()


def test_one_process_goes_on_with_two_processes_checkpoint_and_a_finished_run_trains_no_step(ended, folder, config):
    workdir = folder / "run"
    recorded, results = losses(workdir), results_of(workdir)
    found = train(config, workdir)
    assert losses(workdir) == recorded and found.keys() == results.keys()
    for row, figures in results.items():
        assert found[row] == pytest.approx(figures), row


def parameters(config, workdir: pathlib.Path) -> dict[str, jax.Array]:
    """Those of a run's newest checkpoint, by path."""
    mesh = sharding.make_mesh()
    shapes = parameter_shapes(make_model(config, mesh), config.frames)
    with Checkpoints(workdir / "checkpoints") as saved:
        return flat(saved.restore_parameters(saved.latest(), shapes, sharding.shardings(shapes, mesh), averaged=False))


def test_frozen_parameters_split_over_two_processes_are_saved_as_one_process_saves_them(
    ended, folder, config, tmp_path
):
    """In bfloat16, each kernel split in two: after a fresh and a resumed run, the checkpoint has the float32 values of
    frozen parameters, to the bit."""
    config.stop_after, config.dtype = 1, "bfloat16"
    train(config, tmp_path)
    expected, found = parameters(config, tmp_path), parameters(config, folder / "frozen")
    assert losses(folder / "frozen")[-1][0] == 2
    kernels = [path for path in expected if path.startswith("vision/") and path.endswith("kernel")]
    assert kernels
    for path in kernels:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)
        assert np.any(found[path] != found[path].astype(jnp.bfloat16)), path


def test_two_processes_evaluate_half_of_the_clips_each_and_find_what_one_does(
    ended, folder, finished, data_dir, tmp_path, monkeypatch
):
    """A process evaluates on its own devices, so that not even the last bits may differ."""
    clips, read = set(), ClipReader.read

    def noted(self, source, index, rng):
        clips.add(int(index))
        return read(self, source, index, rng)

    monkeypatch.setattr(ClipReader, "read", noted)
    config = config_file.load(EVALUATE)
    config.update_from_flattened_dict({**EVALUATION, "data.directory": data_dir})
    main.run(config, str(tmp_path), str(finished))
    expected, found = results_of(tmp_path), results_of(folder / "evaluation")
    assert found == expected and len(found) == 4
    assert {"text_to_video/R@1", "CIDEr", "QA all", "QA ranked"} <= set(next(iter(found.values())))
    for name in ("predictions.json", "references.json", "questions.jsonl"):
        assert (folder / "evaluation" / "texts" / name).read_text() == (tmp_path / "texts" / name).read_text()
    assert (folder / "evaluation" / "report" / "index.html").is_file()
    batches = [set(range(first, first + 4)) for first in (0, 4, 8, 12)]
    assert clips == set().union(*batches)
    halves = [set(map(int, (folder / f"clips-{number}").read_text().split())) for number in (0, 1)]
    assert halves == [batches[0] | batches[2], batches[1] | batches[3]]


def test_data_out_of_reach_of_one_process_ends_both_and_what_was_saved_stays(ended, folder):
    assert [each.status for each in ended] == [6, 6], ended
    assert f"error: {OUTAGE} (process 1 of 2, counted from 0)" in ended[0].stderr.splitlines()
    assert f"error: {OUTAGE}" in ended[1].stderr.splitlines()
    with Checkpoints(folder / "failed" / "checkpoints") as saved:
        assert saved.latest() == 6
        assert saved.read_json(6, PROGRESS)["seen"] == 6 * 8  # of both processes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({sharding.COUNT: "2"}, "JAX_NUM_PROCESSES is set, but JAX_COORDINATOR_ADDRESS is not"),
        (
            {sharding.COORDINATOR: "localhost:1", sharding.COUNT: "2", sharding.NUMBER: "2"},
            "JAX_PROCESS_ID=2 must be a number from 0 to JAX_NUM_PROCESSES=2 less 1",
        ),
    ],
)
def test_variables_that_make_no_sense_are_explained_in_one_line(monkeypatch, values, message):
    for name in (sharding.COORDINATOR, sharding.COUNT, sharding.NUMBER):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=re.escape(message)):
        sharding.connect()
