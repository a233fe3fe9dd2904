"""EVA-CLIP checkpoints: EVA01-g/14, EVA02-B/16 and EVA02-L/14.

The vision tower comes in two spellings: OpenCLIP's, around a model of `timm` (`visual.trunk.…`), and that of EVA-CLIP's
authors (`visual.…`). The text tower is OpenCLIP's. No config is needed: the family is closed, and only EVA02 has a
gated MLP.
"""

from collections.abc import Mapping

from vlab_jax.errors import InputError
from vlab_jax.pretrained import open_clip
from vlab_jax.pretrained.convert import (
    LINEAR,
    ONE_AXIS_MORE,
    OUTPUT,
    PATCHES,
    SEPARATE_BIASES,
    SEPARATE_HEADS,
    TWO_AXES_MORE,
    Architecture,
    Rule,
    Sizes,
    linear,
    norm,
    tower_sizes,
)
from vlab_jax.pretrained.files import Files

# The tensors that identify the two spellings, and the prefixes of their names.
TIMM_MARK, TIMM = "visual.trunk.patch_embed.proj.weight", "visual.trunk."
AUTHORS_MARK, AUTHORS = "visual.patch_embed.proj.weight", "visual."

# Parts of a block that the generations and spellings name differently: this package's names → theirs.
EVA01_NAMES = {"mlp/input": "mlp.fc1", "mlp/output": "mlp.fc2"}
_PARTS = ("mlp/gate", "mlp/input", "mlp/ln_inner", "mlp/output", "attention/ln_inner")
TIMM_NAMES = dict(zip(_PARTS, ("mlp.fc1_g", "mlp.fc1_x", "mlp.norm", "mlp.fc2", "attn.norm"), strict=True))
AUTHORS_NAMES = dict(zip(_PARTS, ("mlp.w1", "mlp.w2", "mlp.ffn_ln", "mlp.w3", "attn.inner_attn_ln"), strict=True))

HEAD_WIDTHS = {"EVA01": 88, "EVA02": 64}
# EVA02's rotary positions are scaled to the grid of its pre-training (224 / 14), whatever the patch size.
ROTARY_GRID = 16
# EVA02-E normalises after attention; its tensors have the names and shapes of a larger EVA01.
POST_NORM_WIDTH = 1792
KNOWN = "EVA01-g, EVA02-B, EVA02-L"


def architecture(tensors: Sizes, files: Files, where: str) -> Architecture:
    """The architecture of an EVA-CLIP checkpoint.

    Raises:
      InputError: it is another model than those above.
    """
    prefix, names = (TIMM, TIMM_NAMES) if TIMM_MARK in tensors else (AUTHORS, AUTHORS_NAMES)
    gated = f"{prefix}blocks.0.{names['mlp/gate']}.weight" in tensors
    generation = "EVA02" if gated else "EVA01"
    separate = f"{prefix}blocks.0.attn.q_proj.weight" in tensors
    rules = (
        Rule("logit_scale", ("logit_scale",)),
        *_vision_rules(prefix, names if gated else EVA01_NAMES, separate),
        *open_clip.text_rules(tensors),
    )
    vision, text = tower_sizes(tensors, rules, where)
    if vision["width"] == POST_NORM_WIDTH:
        raise InputError(f"{where} is EVA02-E, whose blocks normalise after attention; known: {KNOWN}")
    if vision["width"] % HEAD_WIDTHS[generation]:
        raise InputError(f"{where}: no {generation} is {vision['width']} wide; known: {KNOWN}")
    config = open_clip.read_config(files) or {}
    pooling = open_clip.tower_config(config, "vision_cfg", files, also=("timm_model_name", "timm_pool"))
    if pooling.get("timm_pool", "token") != "token":
        raise InputError(f"{where}: vision_cfg.timm_pool is {pooling['timm_pool']!r}; EVA-CLIP pools the class token")
    vision |= {
        "heads": vision["width"] // HEAD_WIDTHS[generation],
        "activation": "silu" if gated else "gelu",
        "epsilon": 1e-6,
        "pre_norm": False,
        "patch_bias": True,
        "key_bias": False,
        "projection_bias": True,
        "gated_mlp": gated,
        "inner_norms": gated,
        "rotary_grid": ROTARY_GRID if gated else 0,
    }
    text |= {"heads": text["width"] // 64, "activation": "gelu", "epsilon": 1e-5}
    if config:
        text |= open_clip.text_fields(config, "gelu", files)
    return Architecture(f"{generation}-CLIP", vision, text, rules, ("attn_mask", "rope.freqs_cos", "rope.freqs_sin"))


def _vision_rules(prefix: str, names: Mapping[str, str], separate: bool) -> tuple[Rule, ...]:
    """The rules of the vision tower; `separate`: query, key and value are three tensors."""
    blocks, block = "vision/transformer/blocks", prefix + "blocks.{}"
    heads, attention = f"{blocks}/attention/query_key_value", f"{block}.attn"
    kernels, kernel_layout = (f"{attention}.qkv.weight",), LINEAR
    if separate:
        kernels, kernel_layout = tuple(f"{attention}.{part}_proj.weight" for part in "qkv"), SEPARATE_HEADS
    # Keys have no bias.
    biases = ("q_proj.bias", "v_proj.bias") if separate and prefix == TIMM else ("q_bias", "v_bias")
    rules = [
        Rule("vision/class_embedding", (f"{prefix}cls_token",), TWO_AXES_MORE),
        Rule("vision/position_embedding", (f"{prefix}pos_embed",), ONE_AXIS_MORE),
        *linear("vision/patch_embedding", f"{prefix}patch_embed.proj", PATCHES),
        *norm("vision/ln_post", f"{prefix}norm"),
        *linear("vision/projection", f"{prefix}head"),
        *norm(f"{blocks}/ln_1", f"{block}.norm1"),
        *norm(f"{blocks}/ln_2", f"{block}.norm2"),
        Rule(f"{heads}/kernel", kernels, kernel_layout),
        Rule(f"{heads}/bias", tuple(f"{attention}.{name}" for name in biases), SEPARATE_BIASES),
        *linear(f"{blocks}/attention/output", f"{attention}.proj", OUTPUT),
    ]
    for part, name in names.items():
        rules += (norm if part.endswith("ln_inner") else linear)(f"{blocks}/{part}", f"{block}.{name}")
    return tuple(rules)
