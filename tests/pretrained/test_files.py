"""From a name to the files of a checkpoint, or to one line that says why not."""

import json
import pathlib
import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file

from vlab_jax.errors import InputError
from vlab_jax.pretrained.files import PREFERRED, Tensors, choose, locate
from vlab_jax.pretrained.load import open_checkpoint

ONE = {"a": np.ones((2, 3), np.float32)}


def refusal(name: pathlib.Path | str) -> str:
    """What opening a checkpoint is refused with, which is one line."""
    with pytest.raises(InputError) as raised:
        open_checkpoint(str(name))
    message = str(raised.value)
    assert "\n" not in message
    return message


def sharded(folder: pathlib.Path, names: dict[str, str]) -> pathlib.Path:
    """A directory whose index says which file holds which tensor."""
    for file in set(names.values()):
        save_file({name: np.ones(2, np.float32) for name, where in names.items() if where == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def test_a_file_a_directory_and_an_index_name_the_same_checkpoint(tmp_path):
    save_file(ONE, tmp_path / "model.safetensors")
    for name in (tmp_path, tmp_path / "model.safetensors"):
        assert locate(str(name)).weights == (tmp_path / "model.safetensors",)


def test_shards_are_read_as_one(tmp_path):
    sharded(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    files = locate(str(tmp_path))
    assert [path.name for path in files.weights] == ["model-1.safetensors", "model-2.safetensors"]
    assert dict(Tensors(files.weights)) == {"a": (2,), "b": (2,)}


def test_the_usual_one_of_several_files_is_used_and_else_the_user_must_choose():
    assert choose(["open_clip_model.safetensors", "model.safetensors", "README.md"]) == "model.safetensors"
    assert [choose([name, "other.safetensors"]) for name in PREFERRED] == list(PREFERRED)
    assert choose(["only.safetensors", "x.bin"]) == "only.safetensors"
    assert choose(["config.json"]) is None
    with pytest.raises(
        InputError, match=r"^which of a\.safetensors, b\.safetensors is the checkpoint\? Name the file$"
    ):
        choose(["b.safetensors", "a.safetensors"])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "clip.pt", "epoch_1.pth", "last.ckpt"])
def test_a_pickle_is_never_read_and_the_message_shows_how_to_convert_it(name, tmp_path):
    class Trap:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "run",)

    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    for asked in (tmp_path, tmp_path / name):
        message = refusal(asked)
        assert f"{tmp_path / name} is a PyTorch pickle" in message and "safetensors.torch" in message
    assert not (tmp_path / "run").exists()


def test_the_conversion_in_the_message_works(tmp_path):
    import re
    import subprocess
    import sys

    torch = pytest.importorskip("torch", reason="the conversion of a pickle needs PyTorch")
    torch.save({"state_dict": {"a": torch.ones(2, 3).T}}, tmp_path / "model.pt")
    program = re.search(r'python -c "(.*)"$', refusal(tmp_path))[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert dict(Tensors([tmp_path / "model.safetensors"])) == {"a": (3, 2)}


def test_a_torn_file_and_one_that_is_something_else_are_named(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(ONE, file)
    whole = file.read_bytes()
    for content in (whole[:-4], whole[:20], whole[:5], b"", b"<html>not found</html>", b"\xff" * 64):
        file.write_bytes(content)
        message = refusal(tmp_path)
        assert message.startswith(f"{file} is not a whole safetensors file (") and message.endswith("); fetch it again")


def test_the_pointer_of_git_lfs_is_recognised(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "pointer that Git LFS leaves" in refusal(tmp_path)


def test_a_header_that_lies_is_refused(tmp_path):
    """Sizes beyond the file, tensors that overlap, a header larger than the file."""
    file = tmp_path / "model.safetensors"
    headers = [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}},
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}},
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
    ]
    for header in headers:
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
        assert "is not a whole safetensors file" in refusal(file)
    file.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    assert "is not a whole safetensors file" in refusal(file)


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    (tmp_path / "model-2.safetensors").unlink()
    assert refusal(tmp_path).startswith(
        f"{tmp_path} lacks model-2.safetensors, which model.safetensors.index.json names"
    )


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert "names '../secret.safetensors', which is not beside it" in refusal(tmp_path)


def test_an_index_that_is_torn_or_says_nothing_is_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for text, said in (("{", "cannot be read as JSON"), ("[]", "must be a JSON object"), ("{}", "has no weight_map")):
        index.write_text(text)
        assert said in refusal(tmp_path)


def test_anything_but_a_checkpoint_is_refused(tmp_path):
    assert "holds no .safetensors file" in refusal(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert "is not a checkpoint; name a .safetensors file" in refusal(tmp_path / "notes.txt")
    assert "there is no checkpoint at" in refusal(tmp_path / "nowhere")
    save_file(ONE, tmp_path / "model.safetensors")
    assert "holds neither a CLIP of Hugging Face, OpenCLIP or EVA-CLIP, nor a VLAB export; its tensors: a" in refusal(
        tmp_path
    )


class Hub:
    """A hub that answers from a directory; `files` is what it lists."""

    def __init__(self, folder: pathlib.Path, files: list[str] | Exception):
        self.folder, self.files, self.asked = folder, files, []

    def list_repo_files(self, name):
        if isinstance(self.files, Exception):
            raise self.files
        return self.files

    def snapshot_download(self, name, allow_patterns=None, local_files_only=False):
        self.asked.append((name, allow_patterns, local_files_only))
        if local_files_only and not any(self.folder.iterdir()):
            raise FileNotFoundError(name)
        return str(self.folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub

    def install(files):
        made = Hub(tmp_path, files)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
        return made

    return install


def test_only_the_needed_files_of_a_model_on_the_hub_are_downloaded(hub, tmp_path):
    save_file(ONE, tmp_path / "model.safetensors")
    made = hub(["model.safetensors", "pytorch_model.bin", "tf_model.h5", "config.json"])
    assert locate("openai/clip-vit-base-patch32").weights == (tmp_path / "model.safetensors",)
    ((name, patterns, _),) = made.asked
    assert name == "openai/clip-vit-base-patch32"
    assert {"model.safetensors", "config.json", "vocab.json", "merges.txt"} <= set(patterns)
    assert not any(pattern.endswith((".bin", ".h5")) for pattern in patterns)


def test_a_model_downloaded_before_is_found_without_the_hub(hub, tmp_path):
    save_file(ONE, tmp_path / "model.safetensors")
    hub(ConnectionError("offline"))
    assert locate("hf-hub:laion/some-model").weights == (tmp_path / "model.safetensors",)


def test_a_model_that_the_hub_does_not_have_is_refused(hub):
    hub(RuntimeError("offline"))  # the client's HTTP library has errors of its own
    assert refusal("someone/model").startswith("there is no directory 'someone/model', and no model of that name")


def test_a_model_of_pickles_alone_is_refused(hub):
    hub(["pytorch_model.bin"])
    assert "has only PyTorch pickles, which are not read" in refusal("someone/model")
