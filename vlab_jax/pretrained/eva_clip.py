"""EVA-CLIP checkpoints: EVA01-g/14, EVA02-B/16 and EVA02-L/14.

The vision tower comes in two spellings: OpenCLIP's, around a model of `timm` (`visual.trunk.…`), and that of EVA-CLIP's
authors (`visual.…`). The text tower is OpenCLIP's. No config is needed: the family is closed, and EVA02's tensors tell
it from EVA01's.
"""

from typing import Any

from vlab_jax.errors import InputError
from vlab_jax.pretrained import open_clip
from vlab_jax.pretrained.architecture import Architecture, Sizes, depth, image_size, size_of
from vlab_jax.pretrained.convert import (
    FUSED_HEADS,
    ONE_AXIS_MORE,
    OUTPUT,
    PATCHES,
    SEPARATE_BIASES,
    SEPARATE_HEADS,
    TWO_AXES_MORE,
    Rule,
    linear,
    norm,
)
from vlab_jax.pretrained.files import Files

# The tensors by which the two spellings are known; what stands before their names.
TIMM_MARK, TIMM = "visual.trunk.patch_embed.proj.weight", "visual.trunk."
AUTHORS_MARK, AUTHORS = "visual.patch_embed.proj.weight", "visual."

# Parts of a block of EVA02: this package's name → timm's, and the authors'.
TIMM_NAMES = {
    "gate": "mlp.fc1_g",
    "input": "mlp.fc1_x",
    "ln_mlp": "mlp.norm",
    "output": "mlp.fc2",
    "ln_attention": "attn.norm",
}
AUTHORS_NAMES = {
    "gate": "mlp.w1",
    "input": "mlp.w2",
    "ln_mlp": "mlp.ffn_ln",
    "output": "mlp.w3",
    "ln_attention": "attn.inner_attn_ln",
}

HEAD_WIDTHS = {"EVA01": 88, "EVA02": 64}
# EVA02's rotary positions are scaled to the grid of its pre-training, whatever the patch size (224 / 14).
ROTARY_GRID = 16
# EVA02-E normalises after attention; its tensors have the names and shapes of a larger EVA01.
POST_NORM_WIDTH = 1792
KNOWN = "EVA01-g, EVA02-B, EVA02-L"


def architecture(tensors: Sizes, files: Files, where: str) -> Architecture:
    """The architecture of an EVA-CLIP checkpoint.

    Raises:
      InputError: it is none of the models that this package has.
    """
    prefix = TIMM if TIMM_MARK in tensors else AUTHORS
    vision = {**_sizes(tensors, prefix, where), "pre_norm": False, "patch_bias": True, "key_bias": False}
    generation = "EVA02" if vision["gated_mlp"] else "EVA01"
    if vision["width"] == POST_NORM_WIDTH:
        raise InputError(
            f"{where} is EVA02-E, whose blocks normalise after attention; known: EVA01-g, EVA02-B, EVA02-L"
        )
    if vision["width"] % HEAD_WIDTHS[generation]:
        raise InputError(f"{where}: no {generation} is {vision['width']} wide; known: {KNOWN}")
    config = open_clip.read_config(files) or {}
    pooling = open_clip.known_part(config, "vision_cfg", files, also=("timm_model_name", "timm_pool"))
    if pooling.get("timm_pool", "token") != "token":
        raise InputError(f"{where}: vision_cfg.timm_pool is {pooling['timm_pool']!r}; EVA-CLIP pools the class token")
    vision.update(
        heads=vision["width"] // HEAD_WIDTHS[generation],
        activation="silu" if generation == "EVA02" else "gelu",
        epsilon=1e-6,
        projection_bias=True,
        rotary_grid=ROTARY_GRID if generation == "EVA02" else 0,
    )
    text_prefix = open_clip.text_prefix(tensors)
    text = open_clip.text_sizes(tensors, text_prefix, where)
    text.update({"heads": text["width"] // 64, "activation": "gelu", "epsilon": 1e-5})
    if config:
        text.update(open_clip.text_fields(config, "gelu", files))
    rules = (
        Rule("logit_scale", ("logit_scale",)),
        *_vision_rules(prefix, generation, f"{prefix}blocks.0.attn.q_proj.weight" in tensors),
        *open_clip.text_rules(text_prefix),
    )
    return Architecture(f"{generation}-CLIP", vision, text, rules, ("attn_mask", "rope.freqs_cos", "rope.freqs_sin"))


def _sizes(tensors: Sizes, prefix: str, where: str) -> dict[str, Any]:
    names = TIMM_NAMES if prefix == TIMM else AUTHORS_NAMES
    gated = f"{prefix}blocks.0.{names['gate']}.weight" in tensors
    patches, inward = f"{prefix}patch_embed.proj.weight", names["input"] if gated else "mlp.fc1"
    patch_size = size_of(tensors, patches, -1, where)
    return {
        "image_size": image_size(size_of(tensors, f"{prefix}pos_embed", 1, where), patch_size, where),
        "patch_size": patch_size,
        "width": size_of(tensors, patches, 0, where),
        "depth": depth(tensors, f"{prefix}blocks.{{}}.{inward}.weight"),
        "mlp_width": size_of(tensors, f"{prefix}blocks.0.{inward}.weight", 0, where),
        "embed_width": size_of(tensors, f"{prefix}head.weight", 0, where),
        "gated_mlp": gated,
        "inner_norms": gated,
    }


def _vision_rules(prefix: str, generation: str, separate: bool) -> tuple[Rule, ...]:
    return (
        Rule("vision/class_embedding", (f"{prefix}cls_token",), TWO_AXES_MORE),
        Rule("vision/position_embedding", (f"{prefix}pos_embed",), ONE_AXIS_MORE),
        *linear("vision/patch_embedding", f"{prefix}patch_embed.proj", PATCHES),
        *norm("vision/ln_post", f"{prefix}norm"),
        *linear("vision/projection", f"{prefix}head"),
        *_blocks("vision/transformer/blocks", prefix, generation, separate),
    )


def _blocks(target: str, prefix: str, generation: str, separate: bool) -> list[Rule]:
    source = prefix + "blocks.{}"
    rules = [
        *norm(f"{target}/ln_1", f"{source}.norm1"),
        *norm(f"{target}/ln_2", f"{source}.norm2"),
        *_heads(f"{target}/attention/query_key_value", f"{source}.attn", separate, separate and prefix == TIMM),
        *linear(f"{target}/attention/output", f"{source}.attn.proj", OUTPUT),
    ]
    if generation == "EVA01":
        rules += linear(f"{target}/mlp/input", f"{source}.mlp.fc1")
        return rules + linear(f"{target}/mlp/output", f"{source}.mlp.fc2")
    names = TIMM_NAMES if prefix == TIMM else AUTHORS_NAMES
    rules += norm(f"{target}/attention/ln_inner", f"{source}.{names['ln_attention']}")
    rules += norm(f"{target}/mlp/ln_inner", f"{source}.{names['ln_mlp']}")
    for part in ("gate", "input", "output"):
        rules += linear(f"{target}/mlp/{part}", f"{source}.{names[part]}")
    return rules


def _heads(target: str, source: str, separate: bool, biases_in_projections: bool) -> list[Rule]:
    """Query, key and value in one tensor or three; keys have no bias."""
    biases = ("q_proj.bias", "v_proj.bias") if biases_in_projections else ("q_bias", "v_bias")
    if separate:
        kernel = Rule(f"{target}/kernel", tuple(f"{source}.{part}_proj.weight" for part in "qkv"), SEPARATE_HEADS)
    else:
        kernel = Rule(f"{target}/kernel", (f"{source}.qkv.weight",), FUSED_HEADS)
    return [kernel, Rule(f"{target}/bias", tuple(f"{source}.{name}" for name in biases), SEPARATE_BIASES)]
