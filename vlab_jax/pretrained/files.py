"""From the name of a checkpoint to its files: a file, a directory, or a model on the Hugging Face hub."""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from vlab_jax.errors import InputError
from vlab_jax.pretrained.tensors import read_json

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
