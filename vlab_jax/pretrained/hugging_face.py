"""CLIP checkpoints of `transformers` (`CLIPModel`).

The sizes are read from the tensors; heads, activation and epsilon, which no tensor shows, from `config.json`.
"""

from collections.abc import Mapping
from typing import Any

from vlab_jax.errors import InputError
from vlab_jax.pretrained.convert import (
    LINEAR,
    OUTPUT,
    PATCHES,
    SEPARATE_BIASES,
    SEPARATE_HEADS,
    Architecture,
    Rule,
    Sizes,
    linear,
    norm,
    tower_sizes,
)
from vlab_jax.pretrained.files import Files

# The tensor that identifies the format.
MARK = "vision_model.embeddings.patch_embedding.weight"


def architecture(tensors: Sizes, files: Files, where: str) -> Architecture:
    """The architecture of a `CLIPModel` that `transformers` saved.

    Raises:
      InputError: a tensor that shows a size is missing, or the config is of another kind of model.
    """
    vision, text = tower_sizes(tensors, rules(), where)
    config = files.json("config.json")
    if config is not None:
        of_vision, of_text = _configured_fields(config, files)
        vision, text = vision | of_vision, text | of_text
    return Architecture("Hugging Face CLIP", vision, text, rules(), (".position_ids",))


def rules() -> tuple[Rule, ...]:
    """The rules of a `CLIPModel`."""
    made = [Rule("logit_scale", ("logit_scale",))]
    for tower, projection in (("vision", "visual"), ("text", "text")):
        positions = f"{tower}_model.embeddings.position_embedding.weight"
        made += _blocks(f"{tower}/transformer/blocks", f"{tower}_model.encoder.layers.{{}}")
        made += [
            Rule(f"{tower}/position_embedding", (positions,)),
            Rule(f"{tower}/projection/kernel", (f"{projection}_projection.weight",), LINEAR),
        ]
    made += [
        Rule("vision/class_embedding", ("vision_model.embeddings.class_embedding",)),
        Rule("vision/patch_embedding/kernel", (MARK,), PATCHES),
        Rule("text/token_embedding", ("text_model.embeddings.token_embedding.weight",)),
        *norm("vision/ln_pre", "vision_model.pre_layrnorm"),
        *norm("vision/ln_post", "vision_model.post_layernorm"),
        *norm("text/ln_final", "text_model.final_layer_norm"),
    ]
    return tuple(made)


def _blocks(target: str, source: str) -> list[Rule]:
    parts = [f"{source}.self_attn.{part}_proj" for part in "qkv"]
    heads = f"{target}/attention/query_key_value"
    return [
        *norm(f"{target}/ln_1", f"{source}.layer_norm1"),
        *norm(f"{target}/ln_2", f"{source}.layer_norm2"),
        Rule(f"{heads}/kernel", tuple(f"{part}.weight" for part in parts), SEPARATE_HEADS),
        Rule(f"{heads}/bias", tuple(f"{part}.bias" for part in parts), SEPARATE_BIASES),
        *linear(f"{target}/attention/output", f"{source}.self_attn.out_proj", OUTPUT),
        *linear(f"{target}/mlp/input", f"{source}.mlp.fc1"),
        *linear(f"{target}/mlp/output", f"{source}.mlp.fc2"),
    ]


def _configured_fields(config: Mapping[str, Any], files: Files) -> list[dict[str, Any]]:
    """Of both towers, the fields that no tensor shows; `transformers` knows the defaults that a config leaves out."""
    path = files.folder / "config.json"
    if config.get("model_type") != "clip":
        raise InputError(f"{path} describes a model of type {config.get('model_type')!r}; it must be 'clip'")
    from transformers import CLIPConfig  # here, because importing transformers takes seconds

    try:
        read = CLIPConfig.from_dict(dict(config))
    except Exception as error:  # a wrong value can fail in many ways
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    found = []
    for tower in ("vision_config", "text_config"):
        part = getattr(read, tower)
        if part.hidden_act not in ("quick_gelu", "gelu"):
            raise InputError(f"{path}: hidden_act is {part.hidden_act!r} in {tower}; known: quick_gelu, gelu")
        found.append({"heads": part.num_attention_heads, "activation": part.hidden_act, "epsilon": part.layer_norm_eps})
    return found
