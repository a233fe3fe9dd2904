"""Adding a mixer or a blending takes its function and its line in the registry: config, model and FLOPs follow."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from tiny_models import FRAMES, PATCHES, quick_jit, random_batch, random_parameters, tiny_vlab

from vlab_jax import config_check
from vlab_jax.models.attention_check import AttentionShape, attention_shapes
from vlab_jax.models.decoder import BLENDINGS, Blending
from vlab_jax.models.flops import Workload, forward_flops
from vlab_jax.models.video_adapter import MIXERS, Mixer
from vlab_jax.models.vlab import STREAMS

WORK = Workload(2, FRAMES, 2, STREAMS, embedded_texts=0, decoded_texts=2)


def outputs(model) -> tuple[jax.Array, jax.Array]:
    """Logits of the plain and of the cached decoder."""
    batch = random_batch(2)

    def run(parameters):
        visual = model.apply({"params": parameters}, batch["video"], STREAMS, (0, 1), method="encode_visual")
        logits = model.apply({"params": parameters}, batch["tokens"], visual.streams, True, method="decode")
        decoder = {"params": parameters["decoder"]}
        cached = model.standalone_decoder().apply(decoder, visual.streams, method="cache_visual").cached
        return logits, cached

    return quick_jit(run)(random_parameters(model))


def test_a_mixer_is_a_function_and_a_line_in_the_registry(monkeypatch):
    def scaled_mean(adapter, x):
        return x.mean(axis=1, keepdims=True) * adapter.param("scale", nn.initializers.ones, (adapter.width,)) + x

    assert config_check.CHOICES["model.adapter.mixer"] == tuple(MIXERS)
    monkeypatch.setitem(MIXERS, "mean", Mixer(scaled_mean, lambda fields, tokens, frames: (tokens * frames, 5.0)))
    mean, conv = (tiny_vlab(adapter={"mixer": mixer}) for mixer in ("mean", "conv"))
    assert np.isfinite(outputs(mean)[0]).all()
    assert set(random_parameters(mean)["video_adapter"]["before_attention"]) == {"down", "up", "scale"}
    tokens = 2 * FRAMES * PATCHES
    convolution = 2 * tokens * conv.adapter["width"] * 3
    assert forward_flops(mean, WORK) - forward_flops(conv, WORK) == 2 * (tokens * FRAMES + 5 - convolution)
    assert attention_shapes(mean, FRAMES, 2, STREAMS, 1, False) == attention_shapes(conv, FRAMES, 2, STREAMS, 1, False)


def test_a_blending_is_a_function_and_a_line_in_the_registry(monkeypatch):
    def gated(module, x, sequences):
        gate = module.param("gate", nn.initializers.ones, ())
        query = module.norm("ln", x)
        return x + sum(jnp.tanh(gate) * module.attend(name, query, sequences[name]) for name in sorted(sequences))

    assert config_check.CHOICES["model.decoder.blending"] == tuple(BLENDINGS)
    monkeypatch.setitem(BLENDINGS, "gated", Blending(STREAMS, gated, flops=lambda width, queries, lengths: (7.0, 1.0)))
    model, parallel = (tiny_vlab(decoder={"blending": blending}) for blending in ("gated", "parallel"))
    logits, cached = outputs(model)
    assert np.isfinite(logits).all() and set(cached) == {"attend_image", "attend_video"}
    own = random_parameters(model)["decoder"]["cross_attention"]
    assert set(own) == {"gate", "ln", "attend_image", "attend_video"}
    width, queries = model.text["width"], 2 * model.text["context_length"]
    usual = 4 * queries * width * (2 * width + (FRAMES + 2) * (PATCHES + 1))
    assert forward_flops(parallel, WORK) - forward_flops(model, WORK) == model.text["depth"] * (usual - 8)
    shapes = attention_shapes(model, FRAMES, 2, STREAMS, 1, False)
    assert AttentionShape(queries // 2, FRAMES * (PATCHES + 1), 2, width // 2) in shapes
