"""CLIP's own files: photographs as its preprocessing gives them, and the embeddings of its weights."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import loaded

from vlab_jax.data.video import decode_clip
from vlab_jax.models.towers import PIXEL_DEVIATION, VisionTower, normalise_pixels


@pytest.fixture(scope="module")
def photos(assets) -> dict[str, np.ndarray]:
    """uint8 `[224, 224, 3]` of each photograph, by the path that trains and serves."""
    files = sorted((assets / "clip" / "images").glob("*.jpg"))
    return {file.stem: decode_clip(file.read_bytes(), num_frames=1, size=224)[0] for file in files}


def test_photographs_are_preprocessed_as_clip_does(photos, assets):
    """To 1/255 in every pixel, and to 2/1000 on average; in fact they are equal."""
    reference = np.load(assets / "clip" / "preprocessed_7x3x224x224.npz")
    assert photos.keys() == set(reference) and len(photos) == 7
    for name, photo in photos.items():
        ours = np.asarray(normalise_pixels(photo[None]))[0]
        difference = np.abs(ours - reference[name].transpose(1, 2, 0)) * np.array(PIXEL_DEVIATION)
        assert difference.max() <= 1 / 255 and difference.mean() <= 2e-3, name


def test_published_weights_give_the_published_embeddings(photos, assets):
    """ViT-B/32 of OpenAI, by any of its names: `VLAB_CLIP_B32=openai/clip-vit-base-patch32`, or a path."""
    name = os.environ.get("VLAB_CLIP_B32")
    if not name:
        pytest.skip("VLAB_CLIP_B32 is unset: no published weights to test with")
    fields, parameters = loaded(name)
    reference = np.load(assets / "clip" / "vitb32_image_embeddings_fp16.npz")
    with jax.default_matmul_precision("highest"):
        images = normalise_pixels(np.stack(list(photos.values())))
        _, features = VisionTower(**fields["vision"]).apply({"params": parameters["vision"]}, images)
    ours = np.asarray(features / jnp.linalg.norm(features, axis=-1, keepdims=True))
    theirs = np.stack([reference[photo].astype(np.float32) for photo in photos])
    theirs /= np.linalg.norm(theirs, axis=-1, keepdims=True)
    np.testing.assert_allclose(ours, theirs, atol=2e-3)  # theirs are float16
