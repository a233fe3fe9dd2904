"""Memory budgets of compiled programs, at CLIP's vocabulary and B/32's text width, with two blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.pretrain import get_config
from experiments.speed.program import one_device
from vlab_jax.models import generation
from vlab_jax.models.generation import GenerationConfig
from vlab_jax.models.vlab import STREAMS, VLAB, parameter_shapes
from vlab_jax.training import programs, setup

GIB = 2**30
CLIPS, BEST = 8, 10


@pytest.fixture(scope="module")
def config():
    made = get_config("b32")
    made.model.vision.depth = made.model.text.depth = 2
    made.dtype = "float32"
    return made


@pytest.fixture(scope="module")
def shapes(config):
    """The model, and the shapes of its decoder's parameters and of a visual cache."""
    model = setup.make_model(config, one_device())
    parameters = parameter_shapes(model, config.frames)
    side = model.vision["image_size"]
    video = jax.ShapeDtypeStruct((CLIPS, config.frames, side, side, 3), jnp.uint8)
    cache = generation.cache_visual.eval_shape(model, STREAMS, tuple(range(config.image_frames)), parameters, video)
    return model, parameters["decoder"], cache


def temporaries(lowered) -> int:
    """Bytes of temporaries of a compiled program."""
    return lowered.compile().memory_analysis().temp_size_in_bytes


def largest_step(model: VLAB, decoder, cache, rows: int, texts: int, longest: int, monkeypatch) -> int:
    """The most temporaries of a step of `text_likelihoods`, for so many texts in each of so many rows."""
    taken = []

    def instead(function):
        def lowered(*arguments):
            taken.append(temporaries(function.lower(*arguments)))
            return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), function.eval_shape(*arguments))

        return lowered

    for name in ("_prefill_clips", "_log_likelihoods"):
        monkeypatch.setattr(generation, name, instead(getattr(generation, name)))
    prefix = np.full((rows, 1), 5, np.int32), np.ones(rows, np.int32)
    ids = np.full((rows, texts, longest), 5, np.int32), np.full((rows, texts), longest, np.int32)
    scores = generation.text_likelihoods(model, decoder, cache, np.zeros(rows, np.int32), prefix, ids)
    assert scores.shape == (rows, texts)
    return max(taken)


def test_likelihoods_of_re_ranked_captions_take_little_memory(shapes, monkeypatch):
    """512 captions of 76 tokens, as `rerank=10` asks for at once: their logits alone would be 7.2 GiB."""
    assert largest_step(*shapes, rows=32, texts=16, longest=76, monkeypatch=monkeypatch) < 1.5 * GIB


def test_likelihoods_of_a_closed_list_of_answers_take_little_memory(shapes, monkeypatch):
    assert largest_step(*shapes, rows=16, texts=1000, longest=19, monkeypatch=monkeypatch) < 1.5 * GIB


def test_generation_makes_logits_at_the_last_position_of_a_prefix_only(shapes):
    """64 questions of 57 tokens: the logits of all places would be 0.67 GiB."""
    model, decoder, cache = shapes
    prefix = jax.ShapeDtypeStruct((CLIPS * 8, 57), jnp.int32)
    rows, lengths = (jax.ShapeDtypeStruct((CLIPS * 8,), jnp.int32) for _ in range(2))
    generation_config = GenerationConfig(max_tokens=20, end=49407)
    lowered = generation.generate_texts.lower(model, generation_config, decoder, cache, rows, prefix, lengths)
    assert temporaries(lowered) < 0.5 * GIB


def test_a_training_step_does_not_make_the_logits_of_a_whole_batch():
    """Of 64 captions that are read twice they are 1.8 GiB, and their gradients as much again: a step took 6.8 GiB."""
    config = get_config("b32")
    config.model.vision.depth = config.model.text.depth = 2
    config.dtype, config.frames, config.image_frames = "float32", 2, 2
    step = programs.stage_step(config, "adapt", one_device(), 64)
    assert temporaries(step.trace().lower()) < 3.3 * GIB
