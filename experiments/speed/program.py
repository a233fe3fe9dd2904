"""The training step that this folder measures: a stage of `configs/pretrain.py` at a given size.

It can be lowered and compiled from shapes alone, for any mesh, without computing anything.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from configs.pretrain import get_config
from configs.sizes import SIZES
from vlab_jax.models.attention_check import with_checked_kernels
from vlab_jax.models.vlab import VLAB
from vlab_jax.runtime import sharding
from vlab_jax.training import stage as stages
from vlab_jax.training.setup import make_model, read_stage

STAGES = ("blend", "adapt")
OBJECTIVES = {"contrastive": 1.0, "captioning": 1.0, "masked_lm": 1.0, "question_answering": 0.0}


@dataclasses.dataclass(frozen=True)
class Program:
    """A stage of a model on a mesh; `batch` has the shapes of its batches."""

    config: ConfigDict
    model: VLAB
    stage: stages.Stage
    mesh: Mesh
    batch: dict[str, jax.ShapeDtypeStruct]

    def lower(self) -> Any:
        """The step, lowered for its mesh; nothing is computed."""
        return self.stage.step.lower(self.stage.shapes, self.batch)

    def run_shapes(self) -> dict[str, int]:
        """The sizes of the measured step."""
        video = self.batch["video"].shape
        return {"clips": video[0], "frames": video[1], "image frames": self.config.image_frames, "side": video[2]}


def add_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Adds the arguments that choose the step."""
    given = {"size": "b16", "stage": "blend", "batch": 8, "frames": 8, "dtype": "float32", "remat": "none"} | defaults
    parser.add_argument("--size", default=given["size"], choices=sorted(SIZES), help="a size in configs/sizes.py")
    parser.add_argument("--stage", default=given["stage"], choices=STAGES, help="a stage of configs/pretrain.py")
    parser.add_argument("--batch", type=int, default=given["batch"], help="clips in a step")
    parser.add_argument(
        "--frames", type=int, default=given["frames"], help="frames of a clip, half for the image stream"
    )
    parser.add_argument("--dtype", default=given["dtype"], choices=("float32", "bfloat16"))
    parser.add_argument("--remat", default=given["remat"], choices=("none", "dots", "full"))
    parser.add_argument("--unroll", type=int, default=1, help="blocks in one iteration of the loop over blocks")


def configured(
    size: str,
    stage: str,
    batch: int,
    *,
    frames: int = 8,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int = 1,
    mesh: Mapping[str, int] | None = None,
) -> ConfigDict:
    """The config of a size with contrastive learning, captioning and masked language modelling, concat blending and an
    separate image encoder, as in `configs/pretrain.py` for accelerators."""
    config = get_config(size)
    config.frames, config.image_frames = frames, max(frames // 2, 1)
    config.dtype = dtype
    config.model.update({"remat": remat, "unroll": unroll, "image_encoder": "separate"})
    config.model.decoder.update({"blending": "concat", "cross_attention_every": 1})
    config.stage[stage].batch_size = batch
    config.stage[stage].objectives.update(OBJECTIVES)
    config.mesh.update(mesh or {})
    return config


def prepared(config: ConfigDict, stage: str, mesh: Mesh | None = None) -> Program:
    """Prepares the step of a stage of a config, on the config's mesh over all devices, or on another mesh."""
    mesh = sharding.make_mesh(**config.mesh) if mesh is None else mesh
    model, settings = make_model(config, mesh), read_stage(config, stage)
    model = with_checked_kernels(model, stages.stage_attention_shapes(model, [settings]))
    made = stages.prepare(model, settings, mesh)
    return Program(config, model, made, mesh, stages.batch_shapes(model, settings))


def from_arguments(given: argparse.Namespace, mesh: Mesh | None = None) -> Program:
    """Prepares the step that the arguments of `add_arguments` choose."""
    options = {name: getattr(given, name) for name in ("frames", "dtype", "remat", "unroll")}
    return prepared(configured(given.size, given.stage, given.batch, **options), given.stage, mesh)


def one_device() -> Mesh:
    """A mesh of the first device alone."""
    axis_types = (AxisType.Auto,) * len(sharding.AXES)
    return jax.make_mesh((1, 1, 1), sharding.AXES, axis_types=axis_types, devices=jax.devices()[:1])


def random_batch(program: Program, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of noise clips that are all different, with random tokens in texts of different lengths."""
    rng = np.random.default_rng(seed)
    clips, length = program.batch["tokens"].shape
    vocabulary = program.config.model.text.vocab_size
    return {
        "video": rng.integers(0, 256, program.batch["video"].shape, np.uint8),
        "tokens": rng.integers(1, vocabulary, (clips, length)).astype(np.int32),
        "lengths": rng.integers(length // 2, length + 1, clips).astype(np.int32),
        "clip": np.arange(clips, dtype=np.int32),
    }


def random_parameters(program: Program, seed: int = 0) -> Any:
    """Normal random parameters on the host, small enough for a deep model; scales of norms are near 1."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = sharding.path_name(path)
        if name == "logit_scale":
            return np.asarray(2.0, np.float32)
        values = rng.standard_normal(leaf.shape, np.float32) * 0.02
        return values + 1 if name.endswith("scale") else values

    return jax.tree_util.tree_map_with_path(draw, program.stage.shapes.parameters)
