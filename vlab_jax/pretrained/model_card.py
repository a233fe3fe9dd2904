"""The model card of an export: what it is, what it was trained on and how, what it reaches, whose licence it has."""

import pathlib
from collections.abc import Mapping
from typing import Any

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
