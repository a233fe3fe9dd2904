"""The published sizes of the CLIP models on which VLAB can build.

Sources: the model tables of CLIP (Radford et al., arXiv 2103.00020, table 20; ViT-L/14@336 with OpenAI's release), of
OpenCLIP (Cherti et al., arXiv 2212.07143; the configurations `ViT-H-14`, `ViT-g-14` and `ViT-bigG-14`) and of EVA-CLIP
(Sun et al., arXiv 2303.15389, table 2; the configurations `EVA01-g-14`, `EVA02-B-16` and `EVA02-L-14`).
`tests/models/test_sizes.py` compares their parameter counts with those of the published models.
"""

from typing import Any


def _clip(
    image_size: int, patch_size: int, width: int, depth: int, text_width: int, embed_width: int, text_depth: int = 12
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
    return {"vision": vision, "text": _text(text_width, embed_width, text_depth)}


def _text(width: int, embed_width: int, depth: int = 12) -> dict[str, Any]:
    return {
        "vocab_size": 49408,
        "context_length": 77,
        "width": width,
        "depth": depth,
        "heads": width // 64,
        "mlp_width": 4 * width,
        "embed_width": embed_width,
    }


def _laion(
    width: int, depth: int, head_width: int, mlp_width: int, text_width: int, text_depth: int, embed_width: int
) -> dict[str, Any]:
    """OpenCLIP's larger models, with patch size 14 and the exact GELU."""
    sizes = _clip(224, 14, width, depth, text_width, embed_width, text_depth)
    sizes["vision"].update(heads=width // head_width, mlp_width=mlp_width, activation="gelu")
    sizes["text"].update(activation="gelu")
    return sizes


def _eva(
    patch_size: int, width: int, depth: int, heads: int, mlp_width: int, text_width: int, embed_width: int
) -> dict[str, Any]:
    sizes = _clip(224, patch_size, width, depth, text_width, embed_width)
    sizes["vision"].update(
        heads=heads,
        mlp_width=mlp_width,
        activation="gelu",
        epsilon=1e-6,
        pre_norm=False,
        patch_bias=True,
        key_bias=False,
        projection_bias=True,
    )
    sizes["text"].update(activation="gelu")
    return sizes


def _eva02(
    patch_size: int, width: int, depth: int, mlp_width: int, text_width: int, embed_width: int
) -> dict[str, Any]:
    sizes = _eva(patch_size, width, depth, width // 64, mlp_width, text_width, embed_width)
    sizes["vision"].update(activation="silu", gated_mlp=True, inner_norms=True, rotary_grid=16)
    return sizes


def _tiny() -> dict[str, Any]:
    """A CLIP that trains within minutes on two cores; not a published size."""
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
    "h14": _laion(1280, 32, 80, 5120, 1024, 24, 1024),
    "g14": _laion(1408, 40, 88, 6144, 1024, 24, 1024),
    "bigg14": _laion(1664, 48, 104, 8192, 1280, 32, 1280),
    "eva_g14": _eva(14, 1408, 40, 16, 6144, 768, 1024),
    "eva02_b16": _eva02(16, 768, 12, 2048, 512, 512),
    "eva02_l14": _eva02(14, 1024, 24, 2730, 768, 768),
}
