"""The published sizes have the published models' numbers of parameters."""

import math

import jax
import pytest

from configs.pretrain import get_config
from configs.sizes import SIZES
from vlab_jax.config import adapted_blocks, model_fields, plain
from vlab_jax.models.vlab import VLAB, parameter_shapes

CLIP_PARTS = ("vision", "text", "logit_scale")


def count(tree) -> int:
    """The number of parameters of a tree of shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module", params=[name for name in SIZES if name != "tiny"])
def published(request):
    """A size's name, its config, and the shapes of the whole VLAB that the config builds."""
    config = get_config(request.param)
    model = VLAB.from_fields(model_fields(plain(config.to_dict())))
    return request.param, config, parameter_shapes(model, config.frames)


def test_the_clip_part_has_the_published_number_of_parameters(published):
    """Source: `sum(p.numel() for p in model.parameters())` of open_clip 3.3.0 with timm 1.0.31.

    The configurations there are ViT-B-32, ViT-B-16, ViT-L-14, ViT-L-14-336 (the sizes of OpenAI's release), ViT-H-14,
    ViT-g-14, ViT-bigG-14, EVA01-g-14, EVA02-B-16 and EVA02-L-14. Of EVA01-g-14, `visual` has 1,012,588,928, `text`
    123,846,912, and the temperature 1. Its key biases, constant zeros, are a buffer there and no parameter; they are
    not counted, and this package has none.
    """
    reference = {
        "b32": 151_277_313,
        "b16": 149_620_737,
        "l14": 427_616_513,
        "l14_336": 427_944_193,
        "h14": 986_109_441,
        "g14": 1_366_678_273,
        "bigg14": 2_539_567_105,
        "eva_g14": 1_136_435_841,
        "eva02_b16": 149_691_137,
        "eva02_l14": 427_755_457,
    }
    name, _, shapes = published
    assert sum(count(shapes[part]) for part in CLIP_PARTS) == reference[name]


def test_the_other_parts_have_the_sizes_of_clips_towers(published):
    _, config, shapes = published
    assert set(shapes) == {*CLIP_PARTS, "video_adapter", "image_encoder", "decoder"}
    assert jax.tree.map(lambda leaf: leaf.shape, shapes["image_encoder"]) == jax.tree.map(
        lambda leaf: leaf.shape, shapes["vision"]
    )
    adapter = shapes["video_adapter"]["before_attention"]
    blocks = len(adapted_blocks(config.model.adapter.blocks, config.model.vision.depth))
    assert adapter["down"]["kernel"].shape == (blocks, config.model.vision.width, config.model.adapter.width)
    text_part = {name: shapes["decoder"][name] for name in ("token_embedding", "transformer", "ln_final")}
    assert text_part == {name: shapes["text"][name] for name in text_part}


def test_parameters_are_float32_although_accelerators_compute_in_bfloat16(published):
    _, config, shapes = published
    assert config.dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"float32"}
