"""Exports: a whole VLAB in this package's own format, written and read here, or its CLIP in that of `transformers`.

The own format is safetensors whose tensors are named and shaped as the parameters are, with a `config.json` that holds
the config of the run.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from vlab_jax.errors import InputError
from vlab_jax.models.towers import PIXEL_DEVIATION, PIXEL_MEAN
from vlab_jax.pretrained import hugging_face
from vlab_jax.pretrained.convert import CLIP_DEFAULTS, Architecture, Rule, Sizes
from vlab_jax.pretrained.files import Files

FORMAT, MARK = "VLAB", "vision/class_embedding"  # and the tensor that identifies it
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE = "vlab"  # `model_type` in the config of an export

TITLE = "# VLAB-JAX model"
KINDS = {
    "vlab": "A whole VLAB: CLIP, video adapters, multimodal decoder.\n"
    "`vlab_jax.Predictor.load` and `python -m vlab_jax.predict` use it; `config.model.pretrained` (or "
    "`configs/pretrain.py:pretrained=<this directory>`) starts from it.",
    "clip": "The CLIP of a VLAB, without video adapters and decoder: it embeds frames one by one.\n"
    "`transformers.CLIPModel.from_pretrained` reads this directory.",
}


def architecture(tensors: Sizes, files: Files, where: str) -> Architecture:
    """The architecture of an export of a whole VLAB; raises as `read_config` does."""
    groups: Mapping[str, Any] = read_config(files, where)["training"]["model"]
    others = {group: groups[group] for group in ("adapter", "decoder")}
    rules = tuple(Rule(name, (name,)) for name in tensors)
    return Architecture(FORMAT, groups["vision"], groups["text"], rules, others=others)


def read_config(files: Files, where: str) -> dict[str, Any]:
    """The config of an export of a whole VLAB: `training` is that of the run; the rest is for the model card.

    Raises:
      InputError: it is missing, or is not that of an export.
    """
    config = files.json(CONFIG)
    if config is None or config.get("model_type") != MODEL_TYPE or "training" not in config:
        raise InputError(f"{where} lacks the {CONFIG} of a VLAB export; without it the tensors cannot be used")
    return config


@contextlib.contextmanager
def new_folder(out: pathlib.Path, replace: bool = False) -> Iterator[pathlib.Path]:
    """A folder that becomes `out` when the block ends without an error.

    Args:
      replace: whether it may replace an export, which is identified by its model card.

    Raises:
      InputError: `out` exists, is not empty and may not be replaced; or it cannot be made.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not replace:
            raise InputError(f"{out} exists already; name another directory, or remove it")
        card = out / "README.md"
        if not (card.is_file() and TITLE in card.read_text(encoding="utf-8", errors="replace").splitlines()):
            raise InputError(f"{out} exists already, and is not an export to replace; name another directory")
    partial, old = out.with_name(out.name + ".partial"), out.with_name(out.name + ".old")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            os.replace(out, old)
        os.replace(partial, out)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)


def write_vlab(folder: pathlib.Path, parameters: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Writes a whole VLAB; `config` has `training` (the config of the run) and other facts about the model."""
    tensors = {path: np.asarray(leaf) for path, leaf in flatten_dict(parameters, sep="/").items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "np"})
    _write_json(folder / CONFIG, {"model_type": MODEL_TYPE, **config})


def write_hugging_face(
    folder: pathlib.Path,
    parameters: Mapping[str, Any],
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    start: int,
    end: int,
) -> None:
    """Writes the CLIP of a VLAB in the format of `CLIPModel.from_pretrained`.

    Args:
      vision, text: the fields of the towers.
      start, end: the ids of start and end of text.

    Raises:
      InputError: the vision tower is not one that `CLIPModel` has.
    """
    others = [
        f"model.vision.{key}={vision[key]}" for key, usual in CLIP_DEFAULTS.items() if vision.get(key, usual) != usual
    ]
    if others:
        raise InputError(
            f"Hugging Face's CLIPModel has no vision tower with {', '.join(others)}; export the whole VLAB"
        )
    leaves = flatten_dict({part: parameters[part] for part in ("vision", "text", "logit_scale")}, sep="/")
    tensors = {}
    for rule in hugging_face.rules():
        value = np.asarray(leaves.pop(rule.target))
        blocks = value if rule.stacked else value[None]
        for block, names in zip(blocks, rule.source_names(value.shape), strict=True):
            parts = rule.layout.to_theirs(block)
            tensors |= {name: np.asarray(part, order="C") for name, part in zip(names, parts, strict=True)}
    if leaves:
        raise InputError(f"CLIPModel has no place for {', '.join(leaves)}")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _write_json(folder / "config.json", _hugging_face_config(vision, text, start, end))
    _write_json(folder / "preprocessor_config.json", _preprocessor(vision["image_size"]))


def write_tokenizer_config(folder: pathlib.Path, context_length: int) -> None:
    """Writes the config that `transformers` needs for CLIP's tokenizer, beside its `tokenizer.json`."""
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "bos_token": "<|startoftext|>"}
    ends = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    _write_json(folder / "tokenizer_config.json", config | ends)


def _hugging_face_config(vision: Mapping[str, Any], text: Mapping[str, Any], start: int, end: int) -> dict[str, Any]:
    def tower(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "hidden_size": fields["width"],
            "intermediate_size": fields["mlp_width"],
            "num_hidden_layers": fields["depth"],
            "num_attention_heads": fields["heads"],
            "hidden_act": fields["activation"],
            "layer_norm_eps": fields["epsilon"],
            "projection_dim": fields["embed_width"],
        }

    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": vision["embed_width"],
        "vision_config": {
            **tower(vision),
            "model_type": "clip_vision_model",
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        "text_config": {
            **tower(text),
            "model_type": "clip_text_model",
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "bos_token_id": start,
            "eos_token_id": end,
            "pad_token_id": end,
        },
    }


def _preprocessor(image_size: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_DEVIATION),
        "do_convert_rgb": True,
    }


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def model_card(
    kind: str,
    config: Mapping[str, Any],
    step: int,
    results: Mapping[str, Mapping[str, float]],
    base: Mapping[str, str] | None,
) -> str:
    """A model card in Markdown with the metadata block of the Hugging Face hub.

    Args:
      kind: `vlab` or `clip`.
      config: the config of the run.
      step: the global step of the checkpoint.
      results: the run's table: row → metric → value.
      base: `name`, `format` and `licence` of the weights that the run started from; None: random parameters.
    """
    licence = "apache-2.0" if base is None else base["licence"]
    origin = "None: trained from random parameters."
    if base is not None:
        origin = f"{base['name']} ({base['format']}); licence: {base['licence']}."
    return f"""---
license: {"unknown" if " " in licence else licence}
library_name: {"vlab-jax" if kind == "vlab" else "transformers"}
tags: [video, clip, video-text-retrieval]
---

{TITLE}

{KINDS[kind]}

## Base weights

{origin}

## Training

Checkpoint at step {step}; {config["frames"]} frames a clip. Stages:

{_stages(config)}

## Results

Evaluated on `{config["data"]["evaluate"]}`.

{_table(results)}
"""


def _stages(config: Mapping[str, Any]) -> str:
    lines = ["| stage | steps | clips a step | data | streams |", "|---|---|---|---|---|"]
    for name in config["stages"]:
        stage = config["stage"][name]
        data = ", ".join(f"`{entry}`" for entry in stage["train"] or config["data"]["train"])
        lines.append(f"| {name} | {stage['steps']} | {stage['batch_size']} | {data} | {', '.join(stage['streams'])} |")
    return "\n".join(lines)


def _table(results: Mapping[str, Mapping[str, float]]) -> str:
    if not results:
        return "Not evaluated yet."
    names = list(dict.fromkeys(name for row in results.values() for name in row))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row, metrics in results.items():
        cells = [f"{metrics[name]:.1f}" if name in metrics else "" for name in names]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
