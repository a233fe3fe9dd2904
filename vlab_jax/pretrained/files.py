"""The files of a checkpoint, on a disk or on the Hugging Face hub, their tensors, and their preprocessing."""

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

INDEX = ".safetensors.index.json"
# If a directory has several, the first of these is used.
PREFERRED = ("model.safetensors", "model" + INDEX, "open_clip_model.safetensors", "open_clip_model" + INDEX)
CONFIGS = ("config.json", "open_clip_config.json", "preprocessor_config.json")
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FLOATS = ("F64", "F32", "F16", "BF16")
# CLIP's preprocessing: Pillow's number for the filter, OpenCLIP's names, and configs that leave them out.
BICUBIC, SHORTEST = (3, "bicubic", None), ("shortest", None)


@dataclasses.dataclass(frozen=True)
class Files:
    """The safetensors files of a checkpoint, and the folder with its configs and tokenizer."""

    folder: pathlib.Path
    weights: tuple[pathlib.Path, ...]

    def json(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file of the folder; None if there is no such file."""
        path = self.folder / name
        return read_json(path) if path.is_file() else None


def locate(name: str) -> Files:
    """The files of a checkpoint.

    Args:
      name: a `.safetensors` file, the index of a sharded checkpoint, a directory that holds one of them, or the name
        of a model on the hub, such as `openai/clip-vit-large-patch14`.

    Raises:
      InputError: there is none, a shard is missing, or it is a pickle.
    """
    path = pathlib.Path(name).expanduser()
    if path.is_file():
        return Files(path.parent, _weights(path))
    if not path.is_dir():
        path = _download(name.removeprefix("hf-hub:"))
    names = sorted(entry.name for entry in path.iterdir())
    chosen = choose(names) or next((file for file in names if file.endswith(PICKLES)), None)
    if chosen is None:
        raise InputError(f"{path} holds no .safetensors file; name the directory or the file of a checkpoint")
    return Files(path, _weights(path / chosen))


def may_be_on_hub(name: str) -> bool:
    """Whether a model on the hub can have this name."""
    return re.fullmatch(r"(hf-hub:)?[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def choose(names: Iterable[str]) -> str | None:
    """The file to load of those in a directory: a preferred one, or the only safetensors file; None: there is none.

    Raises:
      InputError: there are several, and none is preferred.
    """
    present = sorted(name for name in names if name.endswith((".safetensors", INDEX)))
    preferred = [name for name in PREFERRED if name in present]
    if len(present) > 1 and not preferred:
        raise InputError(f"which of {', '.join(present)} is the checkpoint? Name the file")
    return next(iter([*preferred, *present]), None)


def _weights(path: pathlib.Path) -> tuple[pathlib.Path, ...]:
    if path.name.endswith(INDEX):
        return _shards(path)
    if path.suffix in PICKLES:
        target = path.with_suffix(".safetensors")
        raise InputError(
            f"{path} is a PyTorch pickle, which can run any code when it is read; if you trust it, convert it with "
            f'PyTorch: python -c "import torch, safetensors.torch as s; t = torch.load({str(path)!r}, '
            f"weights_only=True); t = t.get('state_dict', t); "
            f's.save_file({{k: v.clone().contiguous() for k, v in t.items()}}, {str(target)!r})"'
        )
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is not a checkpoint; name a .safetensors file, its directory, or a model on the hub")
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


def _download(name: str) -> pathlib.Path:
    """The folder of a model on the hub, downloaded unless it is cached."""
    advice = "name a .safetensors file, its directory, or a model on the hub as in 'openai/clip-vit-base-patch32'"
    if not may_be_on_hub(name):
        raise InputError(f"there is no checkpoint at {name!r}; {advice}")
    import huggingface_hub  # here, because a local checkpoint does not need it

    try:
        names = huggingface_hub.HfApi().list_repo_files(name)
    except Exception as error:  # of whichever HTTP library the hub's client uses
        try:
            return pathlib.Path(huggingface_hub.snapshot_download(name, local_files_only=True))
        except (OSError, ValueError):
            raise InputError(
                f"there is no directory {name!r}, and no model of that name can be downloaded; {advice}"
            ) from error
    chosen = choose(names)
    if chosen is None:
        pickles = any(file.endswith(PICKLES) for file in names)
        what = "only PyTorch pickles, which are not read" if pickles else "no safetensors"
        raise InputError(f"the model {name} on the hub has {what}; download it, convert it, and name the file")
    shards = [chosen.removesuffix(INDEX) + "-*.safetensors"] if chosen.endswith(INDEX) else []
    return pathlib.Path(
        huggingface_hub.snapshot_download(name, allow_patterns=[chosen, *shards, *CONFIGS, *TOKENIZER, "README.md"])
    )


class Tensors(Mapping[str, tuple[int, ...]]):
    """Names and shapes of a checkpoint's tensors.

    Raises:
      InputError: a file is not a whole safetensors file, or a tensor is in two files.
    """

    def __init__(self, files: Sequence[pathlib.Path]):
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, pathlib.Path] = {}
        for file in files:
            for name, shape in _shapes(file):
                if name in self._files:
                    raise InputError(f"the tensor {name} is in {self._files[name].name} and in {file.name}")
                self._shapes[name], self._files[name] = shape, file

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def __iter__(self):
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def read(self, names: Iterable[str]) -> list[np.ndarray]:
        """The values of some tensors, in their stored types.

        Files are opened anew for each tensor, which releases the memory mapped for the one before.

        Raises:
          InputError: a tensor is not of a floating-point type, or its file has changed.
        """
        values = []
        for name in names:
            file = self._files[name]
            try:
                with safetensors.safe_open(file, "numpy") as opened:
                    dtype = opened.get_slice(name).get_dtype()
                    if dtype not in FLOATS:
                        raise InputError(f"the tensor {name} in {file} is of type {dtype}; it must be floating point")
                    values.append(opened.get_tensor(name))
            except (OSError, safetensors.SafetensorError) as error:
                raise InputError(f"{file} has changed while it was read: {error}") from error
        return values


def _shapes(file: pathlib.Path) -> Iterable[tuple[str, tuple[int, ...]]]:
    try:
        with safetensors.safe_open(file, "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is not a mapping)
                yield name, tuple(opened.get_slice(name).get_shape())
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        reason = str(error).rpartition(": ")[2]
        with file.open("rb") as opened:
            if opened.read(24).startswith(b"version https://git-lfs"):
                reason = "it is the pointer that Git LFS leaves in place of the file"
        raise InputError(f"{file} is not a whole safetensors file ({reason}); fetch it again") from error


def read_json(file: pathlib.Path) -> dict:
    """The object in a JSON file; an `InputError` if it cannot be read or is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} holds a {type(value).__name__}; it must be a JSON object")
    return value


def check_preprocessing(files: Files) -> None:
    """Compares the preprocessing of images in a checkpoint's configs with CLIP's, the only one of this package.

    Raises:
      InputError: it has other means or deviations, another filter, or does not crop the centre.
    """
    transformers = files.json("preprocessor_config.json")
    if transformers is not None:
        known = {"resample": BICUBIC, "do_center_crop": (True, None)}
        _check_images(transformers, "image_mean", "image_std", known, str(files.folder / "preprocessor_config.json"))
    open_clip = (files.json("open_clip_config.json") or {}).get("preprocess_cfg")
    if isinstance(open_clip, Mapping):
        known = {"interpolation": BICUBIC, "resize_mode": SHORTEST}
        _check_images(open_clip, "mean", "std", known, f"{files.folder / 'open_clip_config.json'}: preprocess_cfg")


def _check_images(config: Mapping[str, Any], mean: str, deviation: str, known: Mapping[str, Any], where: str) -> None:
    """Compares keys of pixels with CLIP's, and others with their known values."""
    for what, key, wanted in (("mean", mean, PIXEL_MEAN), ("deviation", deviation, PIXEL_DEVIATION)):
        found = config.get(key)
        numbers = [one for one in found if isinstance(one, int | float)] if isinstance(found, list) else []
        same = len(numbers) == 3 and max(abs(one - other) for one, other in zip(numbers, wanted, strict=True)) <= 1e-4
        if found is not None and not same:
            raise InputError(f"{where} needs pixels of {what} {found}; known: CLIP's {list(wanted)}")
    for key, values in known.items():
        if config.get(key) not in values:
            raise InputError(f"{where}: {key} is {config[key]!r}; known: {values[0]!r}, as in CLIP")
