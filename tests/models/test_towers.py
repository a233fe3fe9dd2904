"""The CLIP towers compute what PyTorch's `CLIPModel` computes, block by block; and the traps on the way there."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pytorch import pytorch
from tiny_models import largest_difference, with_block_states

from vlab_jax.models.layers import ACTIVATIONS, LayerNorm
from vlab_jax.models.towers import PIXEL_DEVIATION, PIXEL_MEAN, TextTower, VisionTower, normalise_pixels, patches

TOLERANCE = 1e-5  # maximum absolute difference in float32; DESIGN asks for 1e-4

# Activation, head widths of vision and text, and the id of end of text: the highest one, which a config may also
# call 2 (older configurations mean "the highest id in the text" by that).
CASES = {
    "openai": {"activation": "quick_gelu", "vision_heads": 4, "text_heads": 2, "eos": 2},
    "openclip": {"activation": "gelu", "vision_heads": 2, "text_heads": 4, "eos": 98},
}
VISION_WIDTH, TEXT_WIDTH, EMBED, DEPTH, VOCABULARY, LENGTH, SIZE, PATCH = 32, 24, 20, 3, 99, 10, 24, 8
END_OF_TEXT = VOCABULARY - 1


def reference_clip(case):
    """A `CLIPModel` whose every parameter is random, small enough for the norms' epsilon to matter."""
    torch = pytorch()
    from transformers import CLIPConfig, CLIPModel

    shared = {"num_hidden_layers": DEPTH, "hidden_act": case["activation"], "attention_dropout": 0.0}
    vision = {"hidden_size": VISION_WIDTH, "intermediate_size": 64, "num_attention_heads": case["vision_heads"]}
    text = {"hidden_size": TEXT_WIDTH, "intermediate_size": 48, "num_attention_heads": case["text_heads"]}
    config = CLIPConfig(
        vision_config={**shared, **vision, "image_size": SIZE, "patch_size": PATCH},
        text_config={
            **shared,
            **text,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": LENGTH,
            "bos_token_id": 97,
            "eos_token_id": case["eos"],
        },
        projection_dim=EMBED,
    )
    model = CLIPModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = "norm" in name and name.endswith("weight")
            deviation = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 and "embedding" not in name else 0.01
            parameter.copy_(1 + 0.1 * noise if is_scale else deviation * noise)
    return torch, model


def towers_of(case):
    """This package's towers of the same sizes."""
    shared = {"depth": DEPTH, "embed_width": EMBED, "activation": case["activation"]}
    vision = VisionTower(
        image_size=SIZE,
        patch_size=PATCH,
        width=VISION_WIDTH,
        heads=case["vision_heads"],
        mlp_width=64,
        **shared,
    )
    text = TextTower(
        vocab_size=VOCABULARY,
        context_length=LENGTH,
        width=TEXT_WIDTH,
        heads=case["text_heads"],
        mlp_width=48,
        **shared,
    )
    return vision, text


def mapped(state, prefix: str, heads: int):
    """The blocks of an encoder of the reference as this package stacks them."""

    def stack(name):
        return np.stack([state[f"{prefix}.encoder.layers.{i}.{name}"] for i in range(DEPTH)])

    def dense(name):
        return {"kernel": stack(f"{name}.weight").swapaxes(1, 2), "bias": stack(f"{name}.bias")}

    def norm(name):
        return {"norm": {"scale": stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}}

    parts = [dense(f"self_attn.{part}_proj") for part in "qkv"]
    width = parts[0]["bias"].shape[-1]
    split = (heads, width // heads)
    output = dense("self_attn.out_proj")
    attention = {
        "query_key_value": {
            "kernel": np.stack([part["kernel"].reshape(DEPTH, width, *split) for part in parts], axis=2),
            "bias": np.stack([part["bias"].reshape(DEPTH, *split) for part in parts], axis=1),
        },
        "output": {"kernel": output["kernel"].reshape(DEPTH, *split, width), "bias": output["bias"]},
    }
    mlp = {"input": dense("mlp.fc1"), "output": dense("mlp.fc2")}
    return {"ln_1": norm("layer_norm1"), "ln_2": norm("layer_norm2"), "attention": attention, "mlp": mlp}


def parameters_of(model, case):
    """The reference's weights as the two towers' parameters."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}

    def norm(name):
        return {"norm": {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}}

    embeddings = "vision_model.embeddings"
    patch = state[f"{embeddings}.patch_embedding.weight"]  # [D, 3, P, P]
    vision = {
        "patch_embedding": {"kernel": patch.transpose(2, 3, 1, 0).reshape(-1, VISION_WIDTH)},
        "class_embedding": state[f"{embeddings}.class_embedding"],
        "position_embedding": state[f"{embeddings}.position_embedding.weight"],
        "ln_pre": norm("vision_model.pre_layrnorm"),
        "transformer": {"blocks": mapped(state, "vision_model", case["vision_heads"])},
        "ln_post": norm("vision_model.post_layernorm"),
        "projection": {"kernel": state["visual_projection.weight"].T},
    }
    text = {
        "token_embedding": state["text_model.embeddings.token_embedding.weight"],
        "position_embedding": state["text_model.embeddings.position_embedding.weight"],
        "transformer": {"blocks": mapped(state, "text_model", case["text_heads"])},
        "ln_final": norm("text_model.final_layer_norm"),
        "projection": {"kernel": state["text_projection.weight"].T},
    }
    return vision, text


def observed(encoder, run):
    """What each layer of the reference's encoder returns while `run()` runs, and what `run()` returns."""
    states = []

    def keep(module, inputs, output):
        states.append((output[0] if isinstance(output, tuple) else output).numpy())

    hooks = [layer.register_forward_hook(keep) for layer in encoder.layers]
    output = run()
    for hook in hooks:
        hook.remove()
    return np.stack(states), output


def texts(case) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and lengths; past the end stands 0 or, as OpenAI's models have it, end of text again."""
    rng = np.random.default_rng(1)
    lengths = np.array([LENGTH, 3, 6, 2], np.int32)
    tokens = rng.integers(3, 97, (4, LENGTH)).astype(np.int32)
    tokens[:, 0] = 97
    for row, length in zip(tokens, lengths, strict=True):
        row[length - 1] = END_OF_TEXT
        row[length:] = END_OF_TEXT if case["eos"] == 2 else 0
    return tokens, lengths


@pytest.fixture(scope="module", params=list(CASES))
def pair(request):
    """A case, the reference, and this package's towers with the same weights."""
    case = CASES[request.param]
    torch, model = reference_clip(case)
    return case, torch, model, towers_of(case), parameters_of(model, case)


def test_the_vision_tower_matches_the_reference_block_by_block(pair):
    _, torch, model, (tower, _), (parameters, _) = pair
    images = np.random.default_rng(0).normal(size=(3, SIZE, SIZE, 3)).astype(np.float32)
    with torch.no_grad():
        pixels = torch.tensor(images.transpose(0, 3, 1, 2))
        states, output = observed(model.vision_model.encoder, lambda: model.vision_model(pixels))
        expected = model.visual_projection(output.pooler_output).numpy()
    (tokens, embeddings), every = with_block_states(tower, parameters, jnp.asarray(images))
    assert every.shape == states.shape == (DEPTH, 3, 10, VISION_WIDTH)
    for block, (ours, theirs) in enumerate(zip(every, states, strict=True)):
        assert largest_difference(ours, theirs) < TOLERANCE, f"block {block}"
    assert largest_difference(tokens, states[-1]) < TOLERANCE
    assert largest_difference(embeddings, expected) < TOLERANCE
    assert np.abs(expected).max() > 0.5  # not the agreement of two zeros


def test_the_text_tower_matches_the_reference_and_pools_where_it_pools(pair):
    case, torch, model, (_, tower), (_, parameters) = pair
    tokens, lengths = texts(case)
    with torch.no_grad():
        ids = torch.tensor(tokens, dtype=torch.long)
        states, output = observed(model.text_model.encoder, lambda: model.text_model(ids))
        expected = model.text_projection(output.pooler_output).numpy()
    (final, embeddings), every = with_block_states(tower, parameters, jnp.asarray(tokens), jnp.asarray(lengths))
    assert every.shape == states.shape == (DEPTH, 4, LENGTH, TEXT_WIDTH)
    for block, (ours, theirs) in enumerate(zip(every, states, strict=True)):
        assert largest_difference(ours, theirs) < TOLERANCE, f"block {block}"
    assert largest_difference(final, output.last_hidden_state.numpy()) < TOLERANCE
    assert largest_difference(embeddings, expected) < TOLERANCE
    assert np.abs(expected).max() > 0.5


def test_the_layer_norm_keeps_its_precision_where_the_mean_is_large():
    """The variance as a difference of squares, Flax's default, loses all digits here."""
    x = jnp.asarray(300 + 0.1 * np.random.default_rng(0).normal(size=(5, 64)), jnp.float32)
    exact = np.asarray(x, np.float64)
    expected = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    norm = LayerNorm()
    ours = norm.apply(norm.init(jax.random.key(0), x), x)
    assert largest_difference(ours, expected) < 1e-3


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_the_layer_norm_adds_the_epsilon_that_it_is_given(epsilon):
    x = jnp.asarray(1e-3 * np.random.default_rng(0).normal(size=(5, 64)), jnp.float32)
    exact = np.asarray(x, np.float64)
    expected = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + epsilon)
    norm = LayerNorm(epsilon)
    assert largest_difference(norm.apply(norm.init(jax.random.key(0), x), x), expected) < 1e-5


def test_the_towers_use_clips_epsilon_unless_told_otherwise():
    assert VisionTower.epsilon == TextTower.epsilon == 1e-5


def test_gelu_is_the_exact_form_and_quick_gelu_openais():
    x = np.linspace(-6, 6, 97).astype(np.float32)
    exact = [value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x.tolist()]
    quick = [value / (1 + math.exp(-1.702 * value)) for value in x.tolist()]
    assert largest_difference(ACTIVATIONS["gelu"](x), exact) < 2e-6
    assert largest_difference(ACTIVATIONS["quick_gelu"](x), quick) < 2e-6
    assert largest_difference(exact, quick) > 0.01
    assert largest_difference(jax.nn.gelu(x), exact) > 1e-4  # the tanh form, Flax's default, would be told apart


def test_the_norm_and_the_softmax_are_float32_whatever_is_computed_in():
    """The mean of many bfloat16 numbers is not rounded on the way."""
    x = jnp.asarray(64 + np.random.default_rng(0).normal(size=(2, 512)), jnp.bfloat16)
    norm = LayerNorm(dtype=jnp.bfloat16)
    ours = norm.apply(norm.init(jax.random.key(0), x), x)
    exact = np.asarray(x, np.float64)
    expected = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    assert ours.dtype == jnp.bfloat16
    assert largest_difference(ours, expected) < 0.01  # the rounding of the result alone


def test_patches_are_cut_row_by_row_and_flattened_as_row_column_channel():
    image = np.arange(4 * 6 * 6 * 3, dtype=np.float32).reshape(4, 6, 6, 3)
    cut = patches(jnp.asarray(image), 3)
    assert cut.shape == (4, 4, 27)
    assert np.array_equal(cut[2, 1], image[2, 0:3, 3:6].reshape(-1))
    assert np.array_equal(cut[3, 2], image[3, 3:6, 0:3].reshape(-1))


def test_pixels_are_normalised_by_clips_mean_and_deviation():
    image = np.zeros((1, 2, 2, 3), np.uint8)
    image[0, 0, 0] = (255, 0, 51)
    ours = normalise_pixels(jnp.asarray(image))[0, 0, 0]
    expected = (np.array([1.0, 0.0, 0.2]) - PIXEL_MEAN) / PIXEL_DEVIATION
    assert largest_difference(ours, expected) < 1e-6
