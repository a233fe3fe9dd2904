"""Weights out: a whole VLAB as safetensors that this package reads back, or the CLIP in it as `transformers` has it.

What is written appears at once, when it is complete.
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
from vlab_jax.pretrained import hugging_face, vlab
from vlab_jax.pretrained.architecture import PLAIN

# FOLDED vlab_jax/pretrained/export.py: The model card of an export: what it is, what it was trained on and how,
# what it reaches, whose licence it has.

KINDS = {
    "vlab": "A whole VLAB: CLIP, video adapters, multimodal decoder.",
    "clip": "The CLIP of a VLAB alone. Video adapters and decoder are left out: it sees frames one by one.",
}
TITLE = "# VLAB-JAX model"
USES = {
    "vlab": "`vlab_jax.Predictor.load` and `python -m vlab_jax.predict` use it; `config.model.pretrained` (or "
    "`configs/pretrain.py:pretrained=<this directory>`) starts from it.",
    "clip": "`transformers.CLIPModel.from_pretrained` reads this directory.",
}


def model_card(
    kind: str,
    config: Mapping[str, Any],
    step: int,
    results: Mapping[str, Mapping[str, float]],
    base: Mapping[str, str] | None,
) -> str:
    """A card in Markdown, with the metadata block of the hub.

    Args:
      kind: `vlab` or `clip`.
      config: the config of the run.
      step: the step of the checkpoint, over all stages.
      results: the run's table: row → metric → value.
      base: `name`, `format` and `licence` of the weights that the run started from; None: it started from nothing.
    """
    licence = "apache-2.0" if base is None else base["licence"]
    known = licence if " " not in licence else "unknown"
    lines = ["---", f"license: {known}", "library_name: vlab-jax" if kind == "vlab" else "library_name: transformers"]
    lines += [
        "tags: [video, clip, video-text-retrieval]",
        "---",
        "",
        TITLE,
        "",
        KINDS[kind],
        USES[kind],
        "",
    ]
    lines += ["## Base weights", ""]
    if base is None:
        lines += ["None: trained from random parameters."]
    else:
        lines += [f"{base['name']} ({base['format']}); licence: {base['licence']}."]
    lines += ["", "## Training", "", f"Checkpoint at step {step}; {config['frames']} frames a clip. Stages:", ""]
    lines += _stages(config)
    lines += ["", "## Results", "", f"Evaluated on `{config['data']['evaluate']}`.", "", *_table(results), ""]
    return "\n".join(lines)


def is_card(path: pathlib.Path) -> bool:
    """Whether a file is such a card."""
    return path.is_file() and TITLE in path.read_text(encoding="utf-8", errors="replace").splitlines()


def _stages(config: Mapping[str, Any]) -> list[str]:
    lines = ["| stage | steps | clips a step | data | streams |", "|---|---|---|---|---|"]
    for name in config["stages"]:
        stage = config["stage"][name]
        data = ", ".join(f"`{entry}`" for entry in stage["train"] or config["data"]["train"])
        lines.append(f"| {name} | {stage['steps']} | {stage['batch_size']} | {data} | {', '.join(stage['streams'])} |")
    return lines


def _table(results: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not results:
        return ["Not evaluated yet."]
    names = list(dict.fromkeys(name for row in results.values() for name in row))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row, metrics in results.items():
        cells = [f"{metrics[name]:.1f}" if name in metrics else "" for name in names]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


WEIGHTS = "model.safetensors"


@contextlib.contextmanager
def new_folder(out: pathlib.Path, replace: bool = False) -> Iterator[pathlib.Path]:
    """A folder to write into, which becomes `out` when all is written.

    Args:
      replace: whether it may take the place of an export, known by its model card.

    Raises:
      InputError: `out` exists, is not empty and is not to be replaced; or it cannot be made.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not replace:
            raise InputError(f"{out} exists already; name another directory, or remove it")
        if not is_card(out / "README.md"):
            raise InputError(f"{out} exists already, and is no export to replace; name another directory")
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
    """Writes a whole VLAB.

    Args:
      parameters: the parameter tree; a tensor's name is its path.
      config: `training` (the config of the run), and whatever else is to be known of the model.
    """
    tensors = {path: np.asarray(leaf) for path, leaf in flatten_dict(parameters, sep="/").items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "np"})
    _write_json(folder / vlab.CONFIG, {"model_type": vlab.MODEL_TYPE, **config})


def write_hugging_face(
    folder: pathlib.Path,
    parameters: Mapping[str, Any],
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    start: int,
    end: int,
) -> None:
    """Writes the CLIP of a VLAB as `CLIPModel.from_pretrained` reads it.

    Args:
      parameters: the parameter tree, of which `vision`, `text` and `logit_scale` are taken.
      vision, text: the fields of the towers.
      start, end: the ids of start and end of text.

    Raises:
      InputError: the vision tower is of a kind that `CLIPModel` is not.
    """
    others = [f"model.vision.{key}={vision[key]}" for key, value in PLAIN.items() if vision.get(key, value) != value]
    if others:
        raise InputError(
            f"Hugging Face's CLIPModel has no vision tower with {', '.join(others)}; export the whole VLAB"
        )
    leaves = flatten_dict({part: parameters[part] for part in ("vision", "text", "logit_scale")}, sep="/")
    tensors = {}
    for rule in hugging_face.rules():
        value = np.asarray(leaves.pop(rule.target))
        blocks = value if rule.stacked else [value]
        for block, names in zip(blocks, rule.source_names(value.shape), strict=True):
            parts = rule.layout.to_theirs(np.asarray(block))
            tensors |= {name: np.asarray(part, order="C") for name, part in zip(names, parts, strict=True)}
    if leaves:
        raise InputError(f"CLIPModel has no place for {', '.join(leaves)}")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _write_json(folder / "config.json", _hugging_face_config(vision, text, start, end))
    _write_json(folder / "preprocessor_config.json", _preprocessor(vision["image_size"]))


def write_tokenizer_config(folder: pathlib.Path, context_length: int) -> None:
    """What `transformers` wants to know of CLIP's tokenizer beside its `tokenizer.json`."""
    end = "<|endoftext|>"
    ends = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, **ends}
    _write_json(folder / "tokenizer_config.json", config)


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
