"""CLIP checkpoints of OpenCLIP, whose names are those of OpenAI's own release.

The sizes are read from the tensors; heads, activation and epsilon, which no tensor tells, from
`open_clip_config.json`.
"""

from collections.abc import Mapping
from typing import Any

from vlab_jax.errors import InputError
from vlab_jax.pretrained.architecture import PLAIN, Architecture, Sizes, depth, image_size, size_of
from vlab_jax.pretrained.convert import FUSED_BIAS, FUSED_HEADS, OUTPUT, PATCHES, SAME, Rule, linear, norm
from vlab_jax.pretrained.files import Files

# The tensor by which the format is known.
MARK = "visual.conv1.weight"

# What OpenCLIP's config may say of a tower without making it another model; anything else must be unset.
KNOWN = {
    "layers",
    "width",
    "head_width",
    "heads",
    "mlp_ratio",
    "patch_size",
    "image_size",
    "context_length",
    "vocab_size",
    "norm_kwargs",
    # of training and of tokenizers
    "patch_dropout",
    "hf_tokenizer_name",
    "tokenizer_kwargs",
    "output_tokens",
    "pad_id",
    "eos_id",
    "timm_model_pretrained",
    "timm_drop",
    "timm_drop_path",
}
DEFAULTS = {
    "pos_embed_type": ("learnable",),
    "pool_type": ("tok", "argmax", "eos"),
    "proj_type": ("linear",),
    "block_type": ("default",),
    # These size a pooling that `attentional_pool` would turn on.
    "attn_pooler_queries": (256,),
    "attn_pooler_heads": (8,),
}


def architecture(tensors: Sizes, files: Files, where: str) -> Architecture:
    """The architecture of an OpenCLIP checkpoint with a ViT.

    Raises:
      InputError: a tensor that tells a size is missing, or the config asks for what CLIP does not have.
    """
    prefix = text_prefix(tensors)
    vision = {**_vision_sizes(tensors, where), **PLAIN}
    text = text_sizes(tensors, prefix, where)
    config = read_config(files)
    if config is not None:
        activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
        told = known_part(config, "vision_cfg", files)
        vision.update(_heads(vision["width"], told.get("head_width", 64), files))
        vision.update(activation=activation, epsilon=_epsilon(told))
        text.update(text_fields(config, activation, files))
    rules = (Rule("logit_scale", ("logit_scale",)), *_vision_rules(), *text_rules(prefix))
    return Architecture("OpenCLIP", vision, text, rules, ("attn_mask",))


def read_config(files: Files) -> dict[str, Any] | None:
    """The model's part of `open_clip_config.json`, if there is that file."""
    config = files.json("open_clip_config.json")
    return None if config is None else config.get("model_cfg", config)


def known_part(config: Mapping[str, Any], part: str, files: Files, also: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """`vision_cfg` or `text_cfg` of OpenCLIP's config, once it is known to say nothing that would be ignored.

    Args:
      also: further keys that the caller looks at.

    Raises:
      InputError: it sets what this package's towers do not have.
    """
    fields = config.get(part, {})
    for key, value in fields.items():
        usual = key in KNOWN or key in also or not value or value in DEFAULTS.get(key, ())
        if not usual:
            path = files.folder / "open_clip_config.json"
            raise InputError(f"{path}: {part}.{key} is {value!r}, which no tower here has")
    return fields


def text_fields(config: Mapping[str, Any], activation: str, files: Files) -> dict[str, Any]:
    """The fields of the text tower that OpenCLIP's config tells and no tensor does."""
    told = known_part(config, "text_cfg", files)
    return {"heads": told.get("heads", 8), "activation": activation, "epsilon": _epsilon(told)}


def _epsilon(told: Mapping[str, Any]) -> float:
    return (told.get("norm_kwargs") or {}).get("eps", 1e-5)


def _heads(width: int, head_width: int, files: Files) -> dict[str, int]:
    if width % head_width:
        path = files.folder / "open_clip_config.json"
        raise InputError(f"{path}: vision_cfg.head_width={head_width} does not divide the width {width}")
    return {"heads": width // head_width}


def text_prefix(tensors: Sizes) -> str:
    """What stands before the names of the text tower's tensors: nothing, or `text.` in the newer spelling."""
    return "text." if "text.token_embedding.weight" in tensors else ""


def _vision_sizes(tensors: Sizes, where: str) -> dict[str, int]:
    patch_size = size_of(tensors, MARK, -1, where)
    block = "visual.transformer.resblocks.{}.mlp.c_fc.weight"
    return {
        "image_size": image_size(size_of(tensors, "visual.positional_embedding", 0, where), patch_size, where),
        "patch_size": patch_size,
        "width": size_of(tensors, MARK, 0, where),
        "depth": depth(tensors, block),
        "mlp_width": size_of(tensors, block.format(0), 0, where),
        "embed_width": size_of(tensors, "visual.proj", 1, where),
    }


def text_sizes(tensors: Sizes, prefix: str, where: str) -> dict[str, int]:
    """The text tower's sizes, from the tensors."""
    table, block = f"{prefix}token_embedding.weight", prefix + "transformer.resblocks.{}.mlp.c_fc.weight"
    return {
        "vocab_size": size_of(tensors, table, 0, where),
        "context_length": size_of(tensors, f"{prefix}positional_embedding", 0, where),
        "width": size_of(tensors, table, 1, where),
        "depth": depth(tensors, block),
        "mlp_width": size_of(tensors, block.format(0), 0, where),
        "embed_width": size_of(tensors, f"{prefix}text_projection", 1, where),
    }


def _vision_rules() -> tuple[Rule, ...]:
    return (
        Rule("vision/class_embedding", ("visual.class_embedding",)),
        Rule("vision/patch_embedding/kernel", (MARK,), PATCHES),
        Rule("vision/position_embedding", ("visual.positional_embedding",)),
        Rule("vision/projection/kernel", ("visual.proj",), SAME),
        *norm("vision/ln_pre", "visual.ln_pre"),
        *norm("vision/ln_post", "visual.ln_post"),
        *_blocks("vision/transformer/blocks", "visual.transformer.resblocks.{}"),
    )


def text_rules(prefix: str) -> tuple[Rule, ...]:
    """How the tensors of OpenCLIP's text tower become parameters."""
    return (
        Rule("text/token_embedding", (f"{prefix}token_embedding.weight",)),
        Rule("text/position_embedding", (f"{prefix}positional_embedding",)),
        Rule("text/projection/kernel", (f"{prefix}text_projection",), SAME),
        *norm("text/ln_final", f"{prefix}ln_final"),
        *_blocks("text/transformer/blocks", prefix + "transformer.resblocks.{}"),
    )


def _blocks(target: str, source: str) -> list[Rule]:
    heads = f"{target}/attention/query_key_value"
    return [
        *norm(f"{target}/ln_1", f"{source}.ln_1"),
        *norm(f"{target}/ln_2", f"{source}.ln_2"),
        Rule(f"{heads}/kernel", (f"{source}.attn.in_proj_weight",), FUSED_HEADS),
        Rule(f"{heads}/bias", (f"{source}.attn.in_proj_bias",), FUSED_BIAS),
        *linear(f"{target}/attention/output", f"{source}.attn.out_proj", OUTPUT),
        *linear(f"{target}/mlp/input", f"{source}.mlp.c_fc"),
        *linear(f"{target}/mlp/output", f"{source}.mlp.c_proj"),
    ]
