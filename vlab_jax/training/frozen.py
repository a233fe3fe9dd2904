"""Which parameters a stage leaves as they are: those that its objectives do not reach, and those that it keeps frozen.

What no objective reaches has a gradient of zero, and yet AdamW changes it, where it is not frozen: its weight decay
shrinks the kernels of everything that learns.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from vlab_jax.models.multimodal_decoder import BLENDINGS
from vlab_jax.models.vlab import STREAMS, VLAB
from vlab_jax.runtime.sharding import path_name
from vlab_jax.training.optim import Group, assign_groups

# The parts of a VLAB that start as a CLIP, or as a copy of one.
CLIP_PARTS = ("vision", "text", "image_encoder", "logit_scale")


def unused(model: VLAB, weights: Mapping[str, float], streams: Sequence[str]) -> tuple[str, ...]:
    """Patterns of the parameters that no objective of a stage reaches, each for the beginning of a path.

    There may be patterns of parts that the model lacks.

    Args:
      weights: of the objectives; one that is absent or 0 is left out of the stage.
      streams: those that the stage computes.
    """
    contrasts = bool(weights.get("contrastive"))
    decodes = any(weight for name, weight in weights.items() if name != "contrastive")
    embedded = _embedded(model, streams) if contrasts else ()
    read = tuple(each for each in BLENDINGS[model.decoder["blending"]] if each in streams) if decodes else ()
    image_tower = "image_encoder" if model.image_encoder == "separate" else "vision"
    tower_of = {"video": "vision", "image": image_tower}
    patterns = [] if contrasts else ["text/", "logit_scale$"]
    for tower in ("vision", "image_encoder"):
        if tower not in {tower_of[stream] for stream in embedded + read}:
            patterns.append(f"{tower}/")
        elif tower not in {tower_of[stream] for stream in embedded}:
            patterns.append(f"{tower}/(ln_post|projection)/")  # make the embedding; the decoder reads tokens
    if "video" not in embedded + read:
        patterns.append("video_adapter/")
    if not decodes:
        return (*patterns, "decoder/")
    patterns += [f"decoder/({each}_|cross_attention/[a-z]+_{each}/)" for each in STREAMS if each not in read]
    return tuple(patterns) if weights.get("masked_lm") else (*patterns, "decoder/mask_embedding$")


def _embedded(model: VLAB, streams: Sequence[str]) -> tuple[str, ...]:
    """The streams that weigh in the clips' embeddings."""
    if len(streams) == 1:
        return tuple(streams)
    weights = {"image": model.embedding_blend, "video": 1 - model.embedding_blend}
    return tuple(stream for stream in STREAMS if weights[stream])


def freeze_unused(
    parameters: Any, groups: Sequence[Group], model: VLAB, weights: Mapping[str, float], streams: Sequence[str]
) -> tuple[Group, ...]:
    """The groups behind a frozen one for the parameters that no objective reaches, if there are any.

    Args:
      parameters: the model's, or their shapes.
      weights, streams: see `unused`.
    """
    paths = _paths(parameters)
    found = [each for each in unused(model, weights, streams) if any(re.match(each, path) for path in paths)]
    return (Group(f"^({'|'.join(found)})", None), *groups) if found else tuple(groups)


def kept_parts(
    parameters: Any, groups: Sequence[Group], model: VLAB, weights: Mapping[str, float], streams: Sequence[str]
) -> tuple[str, ...]:
    """The parts of CLIP that a stage uses and keeps frozen as a whole, as pre-training keeps an image encoder.

    Args:
      groups: those of the stage's config.
      parameters, weights, streams: see `freeze_unused`.
    """
    idle = re.compile("|".join(unused(model, weights, streams)) or "$")
    numbers = jax.tree.leaves(assign_groups(parameters, groups))
    used = [(path, groups[n]) for path, n in zip(_paths(parameters), numbers, strict=True) if not idle.match(path)]
    rates = {part: [group.learning_rate for path, group in used if path.split("/")[0] == part] for part in CLIP_PARTS}
    return tuple(part for part in CLIP_PARTS if rates[part] and set(rates[part]) == {None})


def _paths(parameters: Any) -> list[str]:
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(parameters)]
