"""A trained model, found by its name: of a run, of an export, or of the hub."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from vlab_jax.config import generation_config
from vlab_jax.data import tokenizer as tokenizers
from vlab_jax.data.tokenizer import Tokenizer
from vlab_jax.errors import InputError
from vlab_jax.models.generation import Search
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.pretrained import vlab
from vlab_jax.pretrained.files import may_be_on_hub
from vlab_jax.pretrained.load import load_parameters, open_checkpoint
from vlab_jax.restore import model_for, restore
from vlab_jax.runtime import sharding

DTYPES = ("float32", "bfloat16")
_ADVICE = "name a run's workdir, its checkpoints/<step>, a directory that vlab_jax.export wrote"


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A model with its parameters on a mesh, its tokenizer, and the config and the last stage of its training."""

    name: str
    mesh: Mesh
    config: dict[str, Any]
    stage: str
    model: VLAB
    parameters: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that its last stage trained."""
        return tuple(self.config["stage"][self.stage]["streams"])

    def search(self, beams: int | None) -> Search:
        """How its run generated texts; with `beams`, where these are given."""
        fields = {**generation_config(), **self.config.get("generation", {})}
        if beams is not None:
            fields["beams"] = beams
        return Search.of(fields, self.tokenizer.end, self.tokenizer.context_length)


def load_trained(name: str, mesh: Mesh, dtype: str | None = None) -> Trained:
    """Loads a model, its parameters placed on the mesh.

    Args:
      name: a run's workdir, its `checkpoints/<step>`, a directory that `vlab_jax.export` wrote, or such a model on
        the hub.
      dtype: what matrix products are computed in; None: as in training.

    Raises:
      InputError: there is none, it cannot be read, or its parameters are not finite.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; it must be {' or '.join(DTYPES)}")
    path = pathlib.Path(name).expanduser()
    of_a_run = path.parent.name == "checkpoints" or (path / "checkpoints").is_dir()
    trained = _from_run(name, path, mesh) if of_a_run else _from_export(name, path, mesh)
    _check_finite(trained)
    return trained if dtype is None else dataclasses.replace(trained, model=trained.model.clone(dtype=dtype))


def _from_run(name: str, path: pathlib.Path, mesh: Mesh) -> Trained:
    found = restore(path, mesh)
    tokenizer = tokenizers.load(found.home, found.config["model"]["text"]["context_length"])
    return Trained(name, mesh, found.config, found.stage, found.model, found.parameters, tokenizer)


def _from_export(name: str, path: pathlib.Path, mesh: Mesh) -> Trained:
    if path.is_dir() and not any(path.glob("*.safetensors*")):
        raise InputError(f"{name} holds no model; {_ADVICE}, or a model on the hub")
    if not path.exists() and not may_be_on_hub(name):
        raise InputError(f"there is no model at {name!r}; {_ADVICE}, or a model on the hub")
    opened = open_checkpoint(name)
    if not opened.whole:
        raise InputError(
            f"{name} is a CLIP alone ({opened.architecture.format}), without video adapters and decoder; train a VLAB "
            f"from it (configs/pretrain.py:pretrained={name}), and name its workdir or export"
        )
    saved = vlab.read_config(opened.files, name)
    config = saved["training"]
    model = model_for(config, mesh)
    shapes = parameter_shapes(model, config["frames"])
    parameters, _ = load_parameters(opened, shapes, sharding.shardings(shapes, mesh))
    tokenizer = tokenizers.load(opened.files.folder, config["model"]["text"]["context_length"])
    # Exports before this was noted are of a run's last stage.
    return Trained(name, mesh, config, saved.get("stage", config["stages"][-1]), model, parameters, tokenizer)


def _check_finite(trained: Trained) -> None:
    leaves = flatten_dict(trained.parameters, sep="/")
    wrong = [path for path, leaf in leaves.items() if not np.isfinite(leaf).all()]  # by NumPy: nothing is compiled
    if wrong:
        raise InputError(
            f"{trained.name} is of no use: {len(wrong)} of its parameters hold numbers that are not finite, such as "
            f"{wrong[0]}; name an earlier checkpoint"
        )
