"""CLIP checkpoints of OpenCLIP, whose tensors are named as in OpenAI's own release.

The sizes are read from the tensors; heads, activation and epsilon, which no tensor shows, from
`open_clip_config.json`.
"""

from collections.abc import Mapping
from typing import Any

from vlab_jax.errors import InputError
from vlab_jax.pretrained.convert import (
    FUSED_BIAS,
    LINEAR,
    OUTPUT,
    PATCHES,
    Architecture,
    Rule,
    Sizes,
    linear,
    norm,
    tower_sizes,
)
from vlab_jax.pretrained.files import Files

# The tensor that identifies the format.
MARK = "visual.conv1.weight"
CONFIG = "open_clip_config.json"

# Keys of a tower in OpenCLIP's config that do not make it another model; any other must be unset, or a default below.
KNOWN = (
    "layers width head_width heads mlp_ratio patch_size image_size context_length vocab_size norm_kwargs "
    # Of training and of tokenizers:
    "patch_dropout hf_tokenizer_name tokenizer_kwargs output_tokens pad_id eos_id timm_model_pretrained timm_drop "
    "timm_drop_path"
)
DEFAULTS = {
    "pos_embed_type": ("learnable",),
    "pool_type": ("tok", "argmax", "eos"),
    "proj_type": ("linear",),
    "block_type": ("default",),
    # The sizes of a pooling that `attentional_pool` would turn on.
    "attn_pooler_queries": (256,),
    "attn_pooler_heads": (8,),
}


def architecture(tensors: Sizes, files: Files, where: str) -> Architecture:
    """The architecture of an OpenCLIP checkpoint with a ViT.

    Raises:
      InputError: a tensor that shows a size is missing, or the config has something that CLIP does not have.
    """
    rules = (Rule("logit_scale", ("logit_scale",)), *_vision_rules(), *text_rules(tensors))
    vision, text = tower_sizes(tensors, rules, where)
    config = read_config(files)
    if config is not None:
        activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
        fields = tower_config(config, "vision_cfg", files)
        heads, rest = divmod(vision["width"], fields.get("head_width", 64))
        if rest:
            raise InputError(
                f"{files.folder / CONFIG}: vision_cfg.head_width={fields.get('head_width', 64)} does not divide the "
                f"width {vision['width']}"
            )
        vision |= {"heads": heads, "activation": activation, "epsilon": _epsilon(fields)}
        text |= text_fields(config, activation, files)
    return Architecture("OpenCLIP", vision, text, rules, ("attn_mask",))


def read_config(files: Files) -> dict[str, Any] | None:
    """The model's part of `open_clip_config.json`; None if there is no such file."""
    config = files.json(CONFIG)
    return None if config is None else config.get("model_cfg", config)


def tower_config(config: Mapping[str, Any], part: str, files: Files, also: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """`vision_cfg` or `text_cfg` of OpenCLIP's config; no key in it is ignored.

    Args:
      also: further keys that the caller reads.

    Raises:
      InputError: it sets something that this package's towers do not have.
    """
    fields, known = config.get(part, {}), {*KNOWN.split(), *also}
    for key, value in fields.items():
        if value and key not in known and value not in DEFAULTS.get(key, ()):
            raise InputError(f"{files.folder / CONFIG}: {part}.{key} is {value!r}, which no tower here has")
    return fields


def text_fields(config: Mapping[str, Any], activation: str, files: Files) -> dict[str, Any]:
    """The fields of the text tower that no tensor shows, from OpenCLIP's config."""
    fields = tower_config(config, "text_cfg", files)
    return {"heads": fields.get("heads", 8), "activation": activation, "epsilon": _epsilon(fields)}


def _epsilon(fields: Mapping[str, Any]) -> float:
    return (fields.get("norm_kwargs") or {}).get("eps", 1e-5)


def _vision_rules() -> tuple[Rule, ...]:
    return (
        Rule("vision/class_embedding", ("visual.class_embedding",)),
        Rule("vision/patch_embedding/kernel", (MARK,), PATCHES),
        Rule("vision/position_embedding", ("visual.positional_embedding",)),
        Rule("vision/projection/kernel", ("visual.proj",)),
        *norm("vision/ln_pre", "visual.ln_pre"),
        *norm("vision/ln_post", "visual.ln_post"),
        *_blocks("vision/transformer/blocks", "visual.transformer.resblocks.{}"),
    )


def text_rules(tensors: Sizes) -> tuple[Rule, ...]:
    """The rules of OpenCLIP's text tower, whose names begin with `text.` in the newer spelling."""
    prefix = "text." if "text.token_embedding.weight" in tensors else ""
    return (
        Rule("text/token_embedding", (f"{prefix}token_embedding.weight",)),
        Rule("text/position_embedding", (f"{prefix}positional_embedding",)),
        Rule("text/projection/kernel", (f"{prefix}text_projection",)),
        *norm("text/ln_final", f"{prefix}ln_final"),
        *_blocks("text/transformer/blocks", prefix + "transformer.resblocks.{}"),
    )


def _blocks(target: str, source: str) -> list[Rule]:
    heads = f"{target}/attention/query_key_value"
    return [
        *norm(f"{target}/ln_1", f"{source}.ln_1"),
        *norm(f"{target}/ln_2", f"{source}.ln_2"),
        Rule(f"{heads}/kernel", (f"{source}.attn.in_proj_weight",), LINEAR),
        Rule(f"{heads}/bias", (f"{source}.attn.in_proj_bias",), FUSED_BIAS),
        *linear(f"{target}/attention/output", f"{source}.attn.out_proj", OUTPUT),
        *linear(f"{target}/mlp/input", f"{source}.mlp.c_fc"),
        *linear(f"{target}/mlp/output", f"{source}.mlp.c_proj"),
    ]
