"""The published sizes of the CLIP models that VLAB can stand on.

Sources: the model tables of CLIP (Radford et al., arXiv 2103.00020, table 20; ViT-L/14@336 with OpenAI's release) and
EVA-CLIP (Sun et al., arXiv 2303.15389, table 2) with the configuration that its authors publish as `EVA01-CLIP-g-14`.
`tests/models/test_sizes.py` compares the number of parameters of each with the published model's.
"""

from typing import Any


def _clip(
    image_size: int, patch_size: int, width: int, depth: int, text_width: int, embed_width: int
) -> dict[str, Any]:
    vision = {
        "image_size": image_size,
        "patch_size": patch_size,
        "width": width,
        "depth": depth,
        "heads": width // 64,
        "mlp_width": 4 * width,
        "embed_width": embed_width,
    }
    return {"vision": vision, "text": _text(text_width, embed_width)}


def _text(width: int, embed_width: int) -> dict[str, Any]:
    return {
        "vocab_size": 49408,
        "context_length": 77,
        "width": width,
        "depth": 12,
        "heads": width // 64,
        "mlp_width": 4 * width,
        "embed_width": embed_width,
    }


def _eva_g14() -> dict[str, Any]:
    vision = {
        "image_size": 224,
        "patch_size": 14,
        "width": 1408,
        "depth": 40,
        "heads": 16,
        "mlp_width": 6144,
        "embed_width": 1024,
        "activation": "gelu",
        "epsilon": 1e-6,
        "pre_norm": False,
        "patch_bias": True,
        "key_bias": False,
        "projection_bias": True,
    }
    return {"vision": vision, "text": {**_text(768, 1024), "activation": "gelu"}}


def _tiny() -> dict[str, Any]:
    """A CLIP that two cores train within minutes; not a published size."""
    vision = {
        "image_size": 48,
        "patch_size": 12,
        "width": 96,
        "depth": 4,
        "heads": 4,
        "mlp_width": 384,
        "embed_width": 96,
    }
    text = {
        "vocab_size": 512,
        "context_length": 24,
        "width": 96,
        "depth": 4,
        "heads": 4,
        "mlp_width": 384,
        "embed_width": 96,
        "token_deviation": 0.2,
    }
    return {"vision": vision, "text": text}


SIZES: dict[str, dict[str, Any]] = {
    "tiny": _tiny(),
    "b32": _clip(224, 32, 768, 12, 512, 512),
    "b16": _clip(224, 16, 768, 12, 512, 512),
    "l14": _clip(224, 14, 1024, 24, 768, 768),
    "l14_336": _clip(336, 14, 1024, 24, 768, 768),
    "eva_g14": _eva_g14(),
}
