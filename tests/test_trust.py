"""Files of others are data: loading them runs none of their code, and false headers are refused in one line."""

import ast
import contextlib
import json
import pathlib
import pickle
import struct
import sys
from collections.abc import Iterator

import jax
import numpy as np
import pytest
import tiny_run
from safetensors.numpy import save_file
from saved_clip import full_fields, on_one_device
from tiny_models import ADAPTER, DECODER, random_parameters, tiny_vlab

from vlab_jax.data import tokenizer as tokenizers
from vlab_jax.errors import InputError
from vlab_jax.models.vlab import parameter_shapes
from vlab_jax.pretrained.export import write_vlab
from vlab_jax.pretrained.files import Tensors
from vlab_jax.pretrained.load import load_parameters, open_checkpoint
from vlab_jax.runtime.checkpoint import Checkpoints, DamagedCheckpoint
from vlab_jax.training import health

SOURCES = sorted((pathlib.Path(__file__).parents[1] / "vlab_jax").rglob("*.py"))
UNPICKLED: list[str] = []
WATCHING: list[bool] = []


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return (open, (self.path, "w"))


def _notice(event: str, arguments: tuple) -> None:
    if WATCHING and event == "pickle.find_class":
        UNPICKLED.append(".".join(arguments))


sys.addaudithook(_notice)


@contextlib.contextmanager
def nothing_is_unpickled() -> Iterator[None]:
    """Fails if a pickle looks up a class or a function, in any library."""
    UNPICKLED.clear()
    WATCHING.append(True)
    try:
        yield
    finally:
        WATCHING.clear()
    assert UNPICKLED == []


def test_the_watch_over_pickles_sees_one(tmp_path):
    content = pickle.dumps(Touch(tmp_path / "made"))
    with pytest.raises(AssertionError), nothing_is_unpickled():
        pickle.loads(content).close()
    assert (tmp_path / "made").exists()


def test_loading_an_export_unpickles_nothing(tmp_path):
    model = tiny_vlab()
    training = {"frames": 4, "stages": [], "stage": {}, "data": {"train": ["motion"], "evaluate": "motion"}}
    training["model"] = {**full_fields(), "adapter": ADAPTER, "decoder": DECODER}
    write_vlab(tmp_path, random_parameters(model), {"training": training})
    tokenizers.train_bpe(["a b"], 300, 8).save(tmp_path)
    shapes = parameter_shapes(model, 4)
    with nothing_is_unpickled():
        load_parameters(open_checkpoint(str(tmp_path)), shapes, on_one_device(shapes))
        tokenizers.load(tmp_path, 8)


def test_restoring_a_checkpoint_unpickles_nothing(tmp_path):
    state = {"parameters": {"a": np.arange(6.0, dtype=np.float32), "b": np.ones((2, 3), np.float32)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {"step": 3}, {"seed": 0})
    shapes = jax.eval_shape(lambda: state)
    placed = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), state)
    with nothing_is_unpickled(), Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(3, shapes, placed)
        assert checkpoints.read_json(3, "progress") == {"step": 3}
    np.testing.assert_array_equal(restored["parameters"]["a"], state["parameters"]["a"])
    for file in (tmp_path / "3").rglob("*"):
        if file.is_file():
            file.write_bytes(pickle.dumps(Touch(tmp_path / "made")))
    with nothing_is_unpickled(), Checkpoints(tmp_path) as checkpoints, pytest.raises((DamagedCheckpoint, InputError)):
        checkpoints.restore(3, shapes, placed)
    assert not (tmp_path / "made").exists()


def test_a_kept_batch_with_objects_in_it_is_refused(tmp_path):
    objects = np.array([Touch(tmp_path / "made")], dtype=object)
    np.savez(tmp_path / "batch.npz", _stage=objects, _step=objects, _ids=objects)
    with nothing_is_unpickled(), pytest.raises(InputError, match="is not a batch that a run has kept"):
        health.replay(tiny_run.get_config(), tmp_path, tmp_path / "batch.npz")
    assert not (tmp_path / "made").exists()


def test_pickles_in_place_of_weights_or_a_tokenizer_are_refused(tmp_path):
    content = pickle.dumps(Touch(tmp_path / "made"))
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with nothing_is_unpickled():
        with pytest.raises(InputError, match="not a whole safetensors file"):
            open_checkpoint(str(tmp_path))
        with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
            tokenizers.load(tmp_path, 8)
    assert not (tmp_path / "made").exists()


def tensor(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "offset before the file": {"a": tensor(offsets=[-8, 0])},
    "offsets the wrong way": {"a": tensor(offsets=[8, 0])},
    "offset of 2**64": {"a": tensor(offsets=[0, 2**64])},
    "offset of 2**63": {"a": tensor(offsets=[2**63 - 8, 2**63])},
    "shape that overflows": {"a": tensor(shape=[2**62, 2, 2])},
    "shape that is negative": {"a": tensor(shape=[-2])},
    "shape of texts": {"a": tensor(shape=["2"])},
    "type that is larger": {"a": tensor("F64")},
    "type that is smaller": {"a": tensor("F16")},
    "type that does not exist": {"a": tensor("PICKLE")},
    "bytes that no tensor has": {"a": tensor(shape=[1], offsets=[0, 4])},
    "tensors that overlap": {"a": tensor(), "b": tensor()},
    "hole": {"a": tensor(shape=[1], offsets=[0, 4]), "b": tensor(shape=[1], offsets=[8, 12])},
    "no object": [1],
    "tensor that is a number": {"a": 1},
    "metadata of numbers": {"__metadata__": {"a": 1}, "b": tensor()},
}


def file_with(folder: pathlib.Path, header: bytes, length: int | None = None) -> pathlib.Path:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(8))
    return path


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused_in_one_line(name, tmp_path):
    path = file_with(tmp_path, json.dumps(HEADERS[name]).encode())
    with pytest.raises(InputError, match="is not a whole safetensors file") as caught:
        Tensors([path])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("length", [0, 1, 8, 100_000_001, 2**31, 2**63, 2**64 - 1])
def test_the_length_of_a_header_is_not_believed(length, tmp_path):
    path = file_with(tmp_path, json.dumps({"a": tensor()}).encode(), length)
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        Tensors([path])


def test_a_header_of_deep_lists_or_foreign_bytes_is_refused(tmp_path):
    for header in (b"[" * 100_000, b'{"a":' * 50_000, b"\xff" * 100, b'{"a": 1}' * 2, b""):
        with pytest.raises(InputError, match="is not a whole safetensors file"):
            Tensors([file_with(tmp_path, header)])


def test_a_name_that_is_given_twice_hides_nothing(tmp_path):
    one, other = (json.dumps(tensor(shape=[1], offsets=[at, at + 4])) for at in (0, 4))
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        Tensors([file_with(tmp_path, f'{{"a": {one}, "a": {other}}}'.encode())])


def test_names_and_types_that_are_only_odd_are_names_and_refused_types(tmp_path):
    names = ["../../etc/passwd", "a\nb", "", "ü😀", "__class__", "x" * 5000]
    save_file({name: np.ones(2, np.float32) for name in names}, tmp_path / "odd.safetensors")
    assert set(Tensors([tmp_path / "odd.safetensors"])) == set(names)
    save_file({"a": np.ones(2, np.int64)}, tmp_path / "whole.safetensors")
    with pytest.raises(InputError, match="of type I64; it must be floating point"):
        Tensors([tmp_path / "whole.safetensors"]).read(["a"])


def calls(source: pathlib.Path) -> Iterator[tuple[str, ast.Call]]:
    """The calls in a file, each after the name of its function, as in `subprocess.Popen`."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_shell_no_evaluation_of_text_and_no_foreign_pickles():
    """Names of files and texts never become commands; only pickles of this program's own processes are read."""
    found = {}
    for source in SOURCES:
        for called, node in calls(source):
            starts = called.split(".")[0] in ("subprocess", "pty", "commands") or called in ("os.system", "os.popen")
            runs = called in ("eval", "exec", "compile", "__import__", "yaml.load", "torch.load", "joblib.load")
            reads = called.split(".")[0] in ("pickle", "marshal", "shelve", "cloudpickle", "dill") and "load" in called
            if starts or runs or reads or any(word.arg in ("shell", "allow_pickle") for word in node.keywords):
                found.setdefault(source.name, set()).add(called)
    assert found.pop("captioning.py") == {"subprocess.Popen"}  # the Java of two scorers, with a fixed command line
    assert found.pop("crash_guard.py") == {"pickle.loads"}  # what this program's own workers send
    assert found.pop("sources.py") == {"pickle.loads"}  # what the same program has pickled a moment before
    assert found.pop("sharding.py") == {"pickle.loads"}  # from another process of the run
    assert found.pop("health.py") == {"np.load"}  # a batch that the run has kept, without pickles
    assert found == {}, "say here why it cannot be made to run what others wrote"


def test_arrays_are_loaded_without_pickles():
    for source in SOURCES:
        for called, node in calls(source):
            if called in ("np.load", "numpy.load"):
                given = {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg == "allow_pickle"}
                assert given == {"allow_pickle": False}, source
