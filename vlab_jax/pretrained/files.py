"""From the name of a checkpoint to its files: a file, a directory, or a model on the Hugging Face hub."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors

from vlab_jax.errors import InputError
from vlab_jax.models.towers import PIXEL_DEVIATION, PIXEL_MEAN

# FOLDED vlab_jax/pretrained/files.py: The tensors of safetensors files: their names and shapes at once, their
# values when asked for.

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is, and what its file's header says of it."""

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: F32, BF16


class Tensors(Mapping[str, tuple[int, ...]]):
    """Names and shapes of a checkpoint's tensors, in one file or several.

    Raises:
      InputError: a file is no whole safetensors file, or a tensor is in two files.
    """

    def __init__(self, files: Sequence[pathlib.Path]):
        self._entries: dict[str, TensorEntry] = {}
        for file in files:
            for name, entry in _entries(file):
                if name in self._entries:
                    raise InputError(f"the tensor {name} is in {self._entries[name].file.name} and in {file.name}")
                self._entries[name] = entry

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def __iter__(self):
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, names: Iterable[str]) -> list[np.ndarray]:
        """The values of some tensors, in the types they are stored in.

        Files are opened for each call: what was mapped into memory for the one before is let go of.

        Raises:
          InputError: a tensor is not of a floating-point type, or its file has changed.
        """
        return [self._read(name) for name in names]

    def _read(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        if entry.dtype not in FLOATS:
            raise InputError(f"the tensor {name} in {entry.file} is of type {entry.dtype}; it must be floating point")
        try:
            with safetensors.safe_open(entry.file, "numpy") as file:
                return file.get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{entry.file} has changed while it was read: {error}") from error


def _entries(file: pathlib.Path) -> Iterable[tuple[str, TensorEntry]]:
    try:
        with safetensors.safe_open(file, "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                part = opened.get_slice(name)
                yield name, TensorEntry(file, tuple(part.get_shape()), part.get_dtype())
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise InputError(f"{file} is not a whole safetensors file ({_reason(file, error)}); fetch it again") from error


def _reason(file: pathlib.Path, error: Exception) -> str:
    with file.open("rb") as opened:
        if opened.read(24).startswith(b"version https://git-lfs"):
            return "it is the pointer that Git LFS leaves in its place"
    return str(error).rpartition(": ")[2]


def read_json(file: pathlib.Path) -> dict:
    """The object in a JSON file.

    Raises:
      InputError: it cannot be read, or is no object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} holds a {type(value).__name__}; it must be a JSON object")
    return value


INDEX = ".safetensors.index.json"
# In a directory that has several, the first of these is taken.
PREFERRED = ("model.safetensors", "model" + INDEX, "open_clip_model.safetensors", "open_clip_model" + INDEX)
CONFIGS = ("config.json", "open_clip_config.json", "preprocessor_config.json")
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclasses.dataclass(frozen=True)
class Files:
    """The safetensors files of a checkpoint, and the folder with what describes them."""

    folder: pathlib.Path
    weights: tuple[pathlib.Path, ...]

    def json(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file of the folder; None where there is no such file."""
        path = self.folder / name
        return read_json(path) if path.is_file() else None


def locate(name: str) -> Files:
    """The files of a checkpoint.

    Args:
      name: a `.safetensors` file, the index of a sharded checkpoint, a directory that holds one of them, or the name
        of a model on the hub, as in `openai/clip-vit-large-patch14`.

    Raises:
      InputError: there is none, a shard is missing, or it is a pickle.
    """
    path = pathlib.Path(name).expanduser()
    if path.is_file():
        return Files(path.parent, _weights(path))
    if not path.is_dir():
        path = _fetched(name.removeprefix("hf-hub:"))
    chosen = choose(entry.name for entry in path.iterdir())
    if chosen is None:
        raise InputError(_nothing_in(path))
    return Files(path, _weights(path / chosen))


def may_be_on_hub(name: str) -> bool:
    """Whether a model on the hub can be called so."""
    return re.fullmatch(r"(hf-hub:)?[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def choose(names: Iterable[str]) -> str | None:
    """The file to load of those in a directory: a preferred one, or the only safetensors file there is.

    Raises:
      InputError: there are several, and no telling which.
    """
    present = {name for name in names if name.endswith((".safetensors", INDEX))}
    for preferred in PREFERRED:
        if preferred in present:
            return preferred
    if len(present) > 1:
        raise InputError(f"which of {', '.join(sorted(present))} is the checkpoint? Name the file")
    return next(iter(present), None)


def _weights(path: pathlib.Path) -> tuple[pathlib.Path, ...]:
    if path.name.endswith(INDEX):
        return _shards(path)
    if path.suffix in PICKLES:
        raise InputError(_pickle(path))
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is no checkpoint; name a .safetensors file, its directory, or a model on the hub")
    return (path,)


def _shards(index: pathlib.Path) -> tuple[pathlib.Path, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index} has no weight_map; fetch it again")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if pathlib.PurePath(name).name != name]
    if outside:
        raise InputError(f"{index} names {outside[0]!r}, which is not beside it")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InputError(f"{index.parent} lacks {', '.join(missing)}, which {index.name} names; fetch it again")
    return tuple(index.parent / name for name in names)


def _nothing_in(folder: pathlib.Path) -> str:
    pickles = sorted(entry for entry in folder.iterdir() if entry.suffix in PICKLES)
    if pickles:
        return _pickle(pickles[0])
    return f"{folder} holds no .safetensors file; name the directory or the file of a checkpoint"


def _pickle(path: pathlib.Path) -> str:
    target = path.with_suffix(".safetensors")
    return (
        f"{path} is a PyTorch pickle, which can run any code when it is read; convert it where you trust it, with "
        f'PyTorch: python -c "import torch, safetensors.torch as s; t = torch.load({str(path)!r}, weights_only=True); '
        f"t = t.get('state_dict', t); "
        f's.save_file({{k: v.clone().contiguous() for k, v in t.items()}}, {str(target)!r})"'
    )


def _fetched(name: str) -> pathlib.Path:
    """The folder of a model on the hub; fetched where it is not cached yet."""
    advice = "name a .safetensors file, its directory, or a model on the hub as in 'openai/clip-vit-base-patch32'"
    if not may_be_on_hub(name):
        raise InputError(f"there is no checkpoint at {name!r}; {advice}")
    import huggingface_hub  # here, because a local checkpoint needs none of it

    try:
        names = huggingface_hub.HfApi().list_repo_files(name)
    except Exception as error:  # of whichever HTTP library the hub's client has below it
        return _cached(name, advice, error)
    chosen = choose(names)
    if chosen is None:
        pickles = [file for file in names if file.endswith(PICKLES)]
        what = "PyTorch pickles alone, which are not read" if pickles else "no safetensors"
        raise InputError(f"the model {name} on the hub has {what}; fetch it, convert it, and name the file")
    shards = [chosen.removesuffix(INDEX) + "-*.safetensors"] if chosen.endswith(INDEX) else []
    return pathlib.Path(
        huggingface_hub.snapshot_download(name, allow_patterns=[chosen, *shards, *CONFIGS, *TOKENIZER, "README.md"])
    )


def _cached(name: str, advice: str, error: Exception) -> pathlib.Path:
    """The folder of a model that was fetched before, for where the hub cannot be reached."""
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        raise InputError(
            f"there is no directory {name!r}, and no model of that name can be fetched; {advice}"
        ) from error


# FOLDED vlab_jax/pretrained/files.py: How a checkpoint wants its images, where its files say so: this
# package does what CLIP does, and nothing else.

BICUBIC = (3, "bicubic", None)  # as Pillow numbers it, as OpenCLIP names it, as configs leave it out
SHORTEST = ("shortest", None)


def check_preprocessing(files: Files) -> None:
    """Compares what the folder of a checkpoint says of its images with CLIP's preprocessing.

    Raises:
      InputError: it has other means or deviations, another filter, or does not crop the centre.
    """
    ours = files.json("preprocessor_config.json")
    if ours is not None:
        where = str(files.folder / "preprocessor_config.json")
        _check_pixels(ours.get("image_mean"), ours.get("image_std"), where)
        _check_one_of(ours, "resample", BICUBIC, where)
        _check_one_of(ours, "do_center_crop", (True, None), where)
    theirs = (files.json("open_clip_config.json") or {}).get("preprocess_cfg")
    if isinstance(theirs, Mapping):
        where = f"{files.folder / 'open_clip_config.json'}: preprocess_cfg"
        _check_pixels(theirs.get("mean"), theirs.get("std"), where)
        _check_one_of(theirs, "interpolation", BICUBIC, where)
        _check_one_of(theirs, "resize_mode", SHORTEST, where)


def _check_pixels(mean: Sequence[float] | None, deviation: Sequence[float] | None, where: str) -> None:
    for name, found, wanted in (("mean", mean, PIXEL_MEAN), ("deviation", deviation, PIXEL_DEVIATION)):
        if found is not None and any(abs(one - other) > 1e-4 for one, other in zip(found, wanted, strict=True)):
            raise InputError(f"{where} asks for pixels of {name} {list(found)}; known: CLIP's {list(wanted)}")


def _check_one_of(config: Mapping[str, Any], key: str, known: Sequence[Any], where: str) -> None:
    if config.get(key) not in known:
        raise InputError(f"{where}: {key} is {config[key]!r}; known: {known[0]!r}, as in CLIP")
