"""The notebook's cells run, in order, as they are; the quick form of them where there is no accelerator."""

import os
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "experiments" / "vlab_colab.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> nbformat.NotebookNode:
    """The notebook after a run of two steps a stage."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ()))
    folder = tmp_path_factory.mktemp("notebook")
    parameters.source = f"QUICK, WORKDIR = True, {str(folder / 'workdir')!r}"
    with pytest.MonkeyPatch.context() as patch:
        for option in ("DRY_RUN", "NO_DEPS", "NO_INDEX"):  # all of it is installed here already
            patch.setenv(f"PIP_{option}", "1")
        patch.setenv("TFDS_DATA_DIR", str(folder / "data"))
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        return NotebookClient(book, timeout=280, resources={"metadata": {"path": str(ROOT)}}).execute()


def output_of(book: nbformat.NotebookNode, words: str) -> str:
    """The output of the only cell that contains these words."""
    (cell,) = (cell for cell in book.cells if cell.cell_type == "code" and words in cell.source)
    return "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")


def test_the_notebook_trains_evaluates_and_looks_at_a_video(executed):
    assert "found no GPU or TPU" in output_of(executed, "install.main")
    assert "cpu" in output_of(executed, "jax.devices()")
    assert "data" in output_of(executed, "make_mesh()")
    assert "text to video" in output_of(executed, "scores = evaluate")
    assert output_of(executed, "predictor.caption").startswith("caption:")
    assert len(output_of(executed, "predictor.rank").splitlines()) == 3


def test_the_notebook_is_kept_without_outputs():
    book = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in book.cells)
    assert os.path.getsize(NOTEBOOK) < 50_000
