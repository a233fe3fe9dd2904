"""CLIP checkpoints of `transformers` (`CLIPModel`).

The sizes are read from the tensors; heads, activation and epsilon, which no tensor tells, from `config.json`.
"""

from collections.abc import Mapping
from typing import Any

from vlab_jax.errors import InputError
from vlab_jax.pretrained.architecture import PLAIN, Architecture, Sizes, depth, image_size, size_of
from vlab_jax.pretrained.convert import LINEAR, OUTPUT, PATCHES, SEPARATE_BIASES, SEPARATE_HEADS, Rule, linear, norm
from vlab_jax.pretrained.files import Files

# The tensor by which the format is known.
MARK = "vision_model.embeddings.patch_embedding.weight"


def architecture(tensors: Sizes, files: Files, where: str) -> Architecture:
    """The architecture of a `CLIPModel` that `transformers` saved.

    Raises:
      InputError: a tensor that tells a size is missing, or the config is of another kind of model.
    """
    vision = {**_vision_sizes(tensors, where), **PLAIN}
    text = _text_sizes(tensors, where)
    config = files.json("config.json")
    if config is not None:
        for tower, fields in _config(config, files).items():
            (vision if tower == "vision" else text).update(fields)
    return Architecture("Hugging Face CLIP", vision, text, rules(), (".position_ids",))


def rules() -> tuple[Rule, ...]:
    """How the tensors of a `CLIPModel` become parameters."""
    made = [Rule("logit_scale", ("logit_scale",))]
    for tower, model, projection in (("vision", "vision_model", "visual"), ("text", "text_model", "text")):
        embeddings = f"{model}.embeddings"
        made += _blocks(f"{tower}/transformer/blocks", f"{model}.encoder.layers.{{}}")
        made += [
            Rule(f"{tower}/position_embedding", (f"{embeddings}.position_embedding.weight",)),
            Rule(
                f"{tower}/projection/kernel",
                (f"{projection}_projection.weight",),
                LINEAR,
            ),
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


def _vision_sizes(tensors: Sizes, where: str) -> dict[str, int]:
    patch_size = size_of(tensors, MARK, -1, where)
    positions = size_of(tensors, "vision_model.embeddings.position_embedding.weight", 0, where)
    block = "vision_model.encoder.layers.{}.mlp.fc1.weight"
    return {
        "image_size": image_size(positions, patch_size, where),
        "patch_size": patch_size,
        "width": size_of(tensors, MARK, 0, where),
        "depth": depth(tensors, block),
        "mlp_width": size_of(tensors, block.format(0), 0, where),
        "embed_width": size_of(tensors, "visual_projection.weight", 0, where),
    }


def _text_sizes(tensors: Sizes, where: str) -> dict[str, int]:
    table, block = "text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.{}.mlp.fc1.weight"
    return {
        "vocab_size": size_of(tensors, table, 0, where),
        "context_length": size_of(tensors, "text_model.embeddings.position_embedding.weight", 0, where),
        "width": size_of(tensors, table, 1, where),
        "depth": depth(tensors, block),
        "mlp_width": size_of(tensors, block.format(0), 0, where),
        "embed_width": size_of(tensors, "text_projection.weight", 0, where),
    }


def _config(config: Mapping[str, Any], files: Files) -> dict[str, dict[str, Any]]:
    """What no tensor tells; `transformers` knows the defaults of what a config leaves out."""
    path = files.folder / "config.json"
    if config.get("model_type") != "clip":
        raise InputError(f"{path} is of a model of type {config.get('model_type')!r}; it must be 'clip'")
    from transformers import CLIPConfig  # here, because importing transformers takes seconds

    try:
        read = CLIPConfig.from_dict(dict(config))
    except Exception as error:  # a wrong value fails in as many ways as there are values
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    found = {}
    for tower, part in (("vision", read.vision_config), ("text", read.text_config)):
        if part.hidden_act not in ("quick_gelu", "gelu"):
            raise InputError(f"{path}: hidden_act is {part.hidden_act!r} in {tower}_config; known: quick_gelu, gelu")
        found[tower] = {
            "heads": part.num_attention_heads,
            "activation": part.hidden_act,
            "epsilon": part.layer_norm_eps,
        }
    return found
