"""Randomly initialised models of PyTorch (`transformers`, `open_clip`, `timm`), saved as their users save them.

No weights are downloaded. Every parameter is random and small enough for the epsilon of the norms to matter.

With the environment variable VLAB_REFERENCE_OUTPUTS, a folder, each model is saved there with its inputs and outputs.
Pythons for which there is no CPU build of PyTorch then compare with what another Python has saved (`.ci/run` does so).
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from pytorch import pytorch
from safetensors.numpy import load_file, save_file

VOCABULARY, LENGTH = 99, 12
END = VOCABULARY - 1  # the id of end of text is the highest one, as CLIP's is
IMAGES, TEXTS = 2, 3
INPUTS = ("images", "tokens", "lengths")


@dataclasses.dataclass(frozen=True)
class Reference:
    """A saved model, its inputs and its outputs.

    `outputs`: `vision blocks` and `text blocks` `[depth, B, L, D]` (every block's output), `image features` and
    `text features` `[B, E]` before normalisation, `token states` `[B, L, D]` (after the text tower's last norm) and
    `logits` `[texts, images]`.
    """

    path: pathlib.Path
    images: np.ndarray  # float32 [B, S, S, 3], normalised
    tokens: np.ndarray  # int32 [B, L]
    lengths: np.ndarray  # int32 [B]
    outputs: dict[str, np.ndarray]


def cached_reference(name: str, make: Callable[[pathlib.Path], Reference], folder: pathlib.Path) -> Reference:
    """What `make` makes in `folder`, or in VLAB_REFERENCE_OUTPUTS if that is set; without PyTorch, what is saved there.

    Skips the test if there is neither.
    """
    shared = os.environ.get("VLAB_REFERENCE_OUTPUTS")
    if not shared:
        return make(folder)
    path = pathlib.Path(shared) / re.sub(r"\W+", "_", name)
    arrays = path.with_suffix(".safetensors")  # of inputs and outputs
    if importlib.util.find_spec("torch") is None and arrays.exists():
        read = load_file(arrays)
        return Reference(path, *(read.pop(name) for name in INPUTS), read)
    made = make(path)
    save_file({**{name: getattr(made, name) for name in INPUTS}, **made.outputs}, arrays)
    return made


def randomise(model: Any, seed: int = 0) -> None:
    """Fills every parameter: norms near one, matrices that keep a row's size, embeddings and biases of 0.01."""
    torch = pytorch()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2 or ("embed" in name and "patch" not in name):
                is_scale = parameter.ndim == 1 and name.endswith("weight")
                parameter.copy_(1 + 0.1 * noise if is_scale else 0.01 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)


def random_inputs(size: int, length: int, vocabulary: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, tokens and lengths; texts differ in length and end at the highest id, with zeros after it."""
    rng = np.random.default_rng(seed)
    images = rng.normal(0, 1, (IMAGES, size, size, 3)).astype(np.float32)
    lengths = rng.integers(4, length + 1, TEXTS).astype(np.int32)
    tokens = np.zeros((TEXTS, length), np.int32)
    for row, count in zip(tokens, lengths, strict=True):
        row[:count] = [vocabulary - 2, *rng.integers(3, vocabulary - 2, count - 2), vocabulary - 1]
    return images, tokens, lengths


def recording(modules: Any) -> list[Any]:
    """A list that the outputs of modules are appended to whenever they run."""
    torch = pytorch()
    outputs: list[Any] = []

    def keep(_module, _inputs, output):
        outputs.append((output if isinstance(output, torch.Tensor) else output[0]).detach())

    for module in modules:
        module.register_forward_hook(keep)
    return outputs


def hugging_face(
    folder: pathlib.Path,
    *,
    vision: dict[str, int],
    text: dict[str, int],
    activation: str = "quick_gelu",
    end: int = 2,
    shard: str = "50GB",
    embed: int = 20,
    dtype: str = "float32",
) -> Reference:
    """A `CLIPModel`, saved by `save_pretrained`; `end` is the id of end of text in its config."""
    torch = pytorch()
    from transformers import CLIPConfig, CLIPModel

    shared = {"hidden_act": activation, "attention_dropout": 0.0}
    length, vocabulary = text["max_position_embeddings"], text["vocab_size"]
    ends = {"bos_token_id": vocabulary - 2, "eos_token_id": end}
    config = CLIPConfig(
        vision_config={**shared, **vision}, text_config={**shared, **text, **ends}, projection_dim=embed
    )
    model = CLIPModel(config).eval()
    randomise(model)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard)
    model = model.float()
    images, tokens, lengths = random_inputs(vision["image_size"], length, vocabulary)
    blocks = recording([*model.vision_model.encoder.layers, *model.text_model.encoder.layers])
    parts = model.visual_projection, model.text_projection, model.text_model.final_layer_norm
    seen, read, states = (recording([part]) for part in parts)
    with torch.no_grad():
        pixels, ids = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(tokens).long()
        logits = model(input_ids=ids, pixel_values=pixels).logits_per_text
    return _reference(
        folder, (images, tokens, lengths), blocks, vision["num_hidden_layers"], seen[0], read[0], states[0], logits
    )


def open_clip(
    folder: pathlib.Path,
    *,
    vision: dict[str, Any],
    text: dict[str, Any],
    quick: bool = False,
    embed: int = 20,
    custom_text: bool = False,
) -> Reference:
    """A CLIP of OpenCLIP, saved like its releases on the hub."""
    pytorch()
    from open_clip.model import CLIP, CustomTextCLIP

    kind = CustomTextCLIP if custom_text else CLIP
    model = kind(embed_dim=embed, vision_cfg=vision, text_cfg=text, quick_gelu=quick).eval()
    config = {"embed_dim": embed, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick}
    return _saved_open_clip(folder, model, config, vision["image_size"], text)


def eva_clip(
    folder: pathlib.Path, *, trunk: dict[str, Any], text: dict[str, Any], image_size: int, embed: int = 20
) -> Reference:
    """An EVA-CLIP: a vision tower of `timm` (class `Eva` with the fields of `trunk`) in OpenCLIP's wrapper."""
    pytorch()
    from open_clip.model import CustomTextCLIP
    from timm.models.eva import Eva

    tower = {"image_size": image_size, "patch_size": image_size, "width": 16, "layers": 1, "head_width": 8}
    model = CustomTextCLIP(embed_dim=embed, vision_cfg=tower, text_cfg=text).eval()
    model.visual = _wrapped(Eva(img_size=image_size, num_classes=embed, global_pool="token", **trunk)).eval()
    named = {"timm_model_name": "eva", "timm_pool": "token", "image_size": image_size}
    return _saved_open_clip(
        folder, model, {"embed_dim": embed, "vision_cfg": named, "text_cfg": text}, image_size, text
    )


def _wrapped(trunk: Any) -> Any:
    torch = pytorch()

    class Wrapped(torch.nn.Module):
        """OpenCLIP's wrapper of a vision tower, without its head."""

        def __init__(self):
            super().__init__()
            self.trunk = trunk

        def forward(self, images):
            return self.trunk(images)

    return Wrapped()


def _saved_open_clip(
    folder: pathlib.Path, model: Any, config: dict[str, Any], size: int, text: dict[str, Any]
) -> Reference:
    torch = pytorch()
    from safetensors import torch as safetensors

    randomise(model)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.save_file(tensors, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    images, tokens, lengths = random_inputs(size, text["context_length"], text["vocab_size"])
    tower = model.visual.trunk.blocks if hasattr(model.visual, "trunk") else model.visual.transformer.resblocks
    texts = model.text if hasattr(model, "text") else model
    blocks = recording([*tower, *texts.transformer.resblocks])
    states = recording([texts.ln_final])
    with torch.no_grad():
        pixels, ids = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(tokens).long()
        seen, read = model.encode_image(pixels), model.encode_text(ids)
        unit = [torch.nn.functional.normalize(features, dim=-1) for features in (read, seen)]
        logits = model.logit_scale.exp() * unit[0] @ unit[1].T
    return _reference(folder, (images, tokens, lengths), blocks, len(tower), seen, read, states[0], logits)


def _reference(
    folder: pathlib.Path,
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray],
    blocks: list[Any],
    depth: int,
    seen: Any,
    read: Any,
    states: Any,
    logits: Any,
) -> Reference:
    outputs = {
        "vision blocks": np.stack([block.numpy() for block in blocks[:depth]]),
        "text blocks": np.stack([block.numpy() for block in blocks[depth:]]),
        "image features": seen.numpy(),
        "token states": states.numpy(),
        "text features": read.numpy(),
        "logits": logits.numpy(),
    }
    return Reference(folder, *inputs, outputs)


# Shapes. Tiny ones have one quirk each; the others are those of published models.
TINY_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
TINY_TEXT = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
HF_VISION = {**TINY_VISION, "image_size": 24, "patch_size": 8}
HF_TEXT = {**TINY_TEXT, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
OPEN_TEXT = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 24, "heads": 3, "layers": 2}
EVA_TEXT = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 64, "heads": 1, "layers": 2}


def _open_vision(head_width: int, heads: int = 2, mlp_ratio: float = 4.0) -> dict[str, Any]:
    width = {"width": head_width * heads, "head_width": head_width, "mlp_ratio": mlp_ratio}
    return {"image_size": 28, "patch_size": 14, "layers": 2, **width}


def _published(size: int, patch: int, width: int, depth: int, text_width: int) -> dict[str, Any]:
    heads = {"num_attention_heads": width // 64, "intermediate_size": 4 * width}
    vision = {"image_size": size, "patch_size": patch, "hidden_size": width, "num_hidden_layers": depth, **heads}
    text = {"vocab_size": 49408, "max_position_embeddings": 77, "hidden_size": text_width, "num_hidden_layers": 12}
    text |= {"num_attention_heads": text_width // 64, "intermediate_size": 4 * text_width}
    return {"vision": vision, "text": text, "embed": text_width, "end": 49407}


EVA01 = {"patch_size": 14, "embed_dim": 176, "depth": 2, "num_heads": 2, "mlp_ratio": 6144 / 1408}
EVA02 = {
    "patch_size": 14,
    "embed_dim": 128,
    "depth": 2,
    "num_heads": 2,
    "qkv_fused": False,
    "mlp_ratio": 4 * 2 / 3,
    "swiglu_mlp": True,
    "scale_mlp": True,
    "scale_attn_inner": True,
    "use_rot_pos_emb": True,
    "ref_feat_shape": (16, 16),
}

CASES: dict[str, Callable[[pathlib.Path], Reference]] = {
    "HF, quick GELU, end of text called 2": lambda to: hugging_face(to, vision=HF_VISION, text=HF_TEXT),
    "HF, exact GELU, end of text by its id": lambda to: hugging_face(
        to, vision=HF_VISION, text=HF_TEXT, activation="gelu", end=END
    ),
    "HF, in shards": lambda to: hugging_face(to, vision=HF_VISION, text=HF_TEXT, shard="20KB"),
    "HF, epsilon 1e-6": lambda to: hugging_face(
        to, vision={**HF_VISION, "layer_norm_eps": 1e-6}, text={**HF_TEXT, "layer_norm_eps": 1e-6}
    ),
    "HF, shape of ViT-B/32": lambda to: hugging_face(to, **_published(224, 32, 768, 12, 512)),
    "HF, shape of ViT-L/14": lambda to: hugging_face(to, **_published(224, 14, 1024, 24, 768)),
    "OpenCLIP, quick GELU, heads of 64": lambda to: open_clip(to, vision=_open_vision(64), text=OPEN_TEXT, quick=True),
    "OpenCLIP, exact GELU, heads of 64": lambda to: open_clip(to, vision=_open_vision(64), text=OPEN_TEXT),
    "OpenCLIP, heads of 80 (H/14)": lambda to: open_clip(to, vision=_open_vision(80), text=OPEN_TEXT),
    "OpenCLIP, heads of 88 (g/14)": lambda to: open_clip(
        to, vision=_open_vision(88, mlp_ratio=4.3637), text=OPEN_TEXT, custom_text=True
    ),
    "OpenCLIP, heads of 104 (bigG/14)": lambda to: open_clip(
        to, vision=_open_vision(104, mlp_ratio=4.9231), text=OPEN_TEXT
    ),
    "EVA01, heads of 88": lambda to: eva_clip(to, trunk=EVA01, text=EVA_TEXT, image_size=28),
    "EVA02, patch 14": lambda to: eva_clip(to, trunk=EVA02, text=EVA_TEXT, image_size=42),
    "EVA02, patch 16": lambda to: eva_clip(to, trunk={**EVA02, "patch_size": 16}, text=EVA_TEXT, image_size=64),
}
