"""The speed of caption generation: with a cache, without one, and by GIT in PyTorch.

    python -m experiments.generation_speed.measure

The sizes are those of `configs/pretrain.py:b16`: a decoder of width 512, 12 blocks and 8 heads that attends to 12
frames of 197 tokens. GIT (`transformers`) gets a decoder of the same width, depth and number of heads, the same number
of visual tokens and the same vocabulary. Parameters are random and no text ends early, so every run generates
`--tokens` tokens. Both sides get random features instead of a vision tower's. All runs are in one process and
alternate; the ratio of their medians counts.
"""

import argparse
import functools
import json
import pathlib
import platform
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.pretrain import get_config
from experiments.timing import commit, medians
from vlab_jax.config import model_fields, plain
from vlab_jax.models.generation import GenerationConfig, generate_texts
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.runtime.disk import write_json

FRAMES = {"video": 8, "image": 4}
TOKENS_A_FRAME, VISION_WIDTH, START = 197, 768, 49406
NEVER_ENDS = -1  # an id without a token


def our_model() -> tuple[VLAB, Any]:
    """VLAB of size b16, and random parameters of its decoder."""
    config = plain(get_config("b16").to_dict())
    model = VLAB.from_fields({**model_fields(config), "dtype": "float32", "remat": "none"})
    shapes = parameter_shapes(model, config["frames"])["decoder"]
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.02, leaf.shape), leaf.dtype), shapes)


def features(batch: int) -> dict[str, np.ndarray]:
    """Random features in place of those of the two vision towers."""
    rng = np.random.default_rng(1)
    shape = (batch, TOKENS_A_FRAME, VISION_WIDTH)
    return {
        stream: rng.normal(0, 1, (shape[0], frames, *shape[1:])).astype(np.float32) for stream, frames in FRAMES.items()
    }


def cached(model: VLAB, parameters: Any, streams: dict[str, Any], tokens: int, beams: int) -> Callable[[], Any]:
    """Generation as the package does it: a visual cache of the clips, then token by token."""
    batch = streams["video"].shape[0]
    prefix, lengths = jnp.full((batch, 1), START, jnp.int32), jnp.ones(batch, jnp.int32)
    search = GenerationConfig(tokens, NEVER_ENDS, beams)

    def run(parameters, streams):
        memory = model.standalone_decoder().apply({"params": parameters}, streams, method="cache_visual")
        return generate_texts(model, search, parameters, memory, None, prefix, lengths)

    compiled = jax.jit(run)
    return lambda: jax.block_until_ready(compiled(parameters, streams).tokens)


def full_prefix(model: VLAB, parameters: Any, streams: dict[str, Any], tokens: int) -> Callable[[], Any]:
    """Greedy generation without a cache: a compiled step reads the whole prefix, `tokens` times."""
    batch, decoder = streams["video"].shape[0], model.standalone_decoder()

    @jax.jit
    def step(parameters, streams, texts, place):
        logits = decoder.apply({"params": parameters}, texts, streams, True)
        token = jnp.take(logits, place, axis=1).argmax(axis=-1).astype(jnp.int32)
        return jax.lax.dynamic_update_index_in_dim(texts, token, place + 1, axis=1)

    def run():
        texts = jnp.zeros((batch, tokens + 1), jnp.int32).at[:, 0].set(START)
        for place in range(tokens):
            texts = step(parameters, streams, texts, place)
        return jax.block_until_ready(texts[:, 1:])

    return run


def git(streams: dict[str, np.ndarray], tokens: int, beams: int) -> Callable[[], Any]:
    """GIT's `generate` on the same features, with a decoder of the same size."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tests"))
    from pytorch import pytorch  # the version of the parity tests

    torch = pytorch()
    from transformers import GitConfig, GitForCausalLM
    from transformers.modeling_outputs import BaseModelOutput

    frames = sum(FRAMES.values())
    vision = {"hidden_size": VISION_WIDTH, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    size = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048}
    config = GitConfig(vision_config=vision, vocab_size=49408, num_image_with_embedding=frames, **size)
    config.eos_token_id = config.pad_token_id = None
    model = GitForCausalLM(config).eval()
    given = torch.from_numpy(np.concatenate([streams["video"], streams["image"]], axis=1))  # [B, F, 197, 768]

    class Given(torch.nn.Module):
        """Replaces the vision tower: returns the features, frame by frame."""

        def __init__(self):
            super().__init__()
            self.frame = -1

        def forward(self, *_: Any, **__: Any) -> BaseModelOutput:
            self.frame = (self.frame + 1) % frames
            return BaseModelOutput(last_hidden_state=given[:, self.frame])

    model.git.image_encoder = Given()
    batch = given.shape[0]
    pixels, prefix = torch.zeros(batch, frames, 3, 32, 32), torch.full((batch, 1), START)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "num_beams": beams, "do_sample": False}

    def run():
        with torch.no_grad():
            texts = model.generate(input_ids=prefix, pixel_values=pixels, **options)
        assert texts.shape == (batch, tokens + 1), texts.shape
        return texts

    return run


def main() -> None:
    """Measures and writes `results.json` beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="clips in a batch")
    parser.add_argument("--tokens", type=int, default=30, help="tokens in a text")
    parser.add_argument("--repeats", type=int, default=3, help="counted runs")
    given = parser.parse_args()
    model, parameters = our_model()
    streams = features(given.batch)
    placed = jax.tree.map(jnp.asarray, streams)
    runs = {
        "cached, greedy": cached(model, parameters, placed, given.tokens, 1),
        "cached, beam 3": cached(model, parameters, placed, given.tokens, 3),
        "full prefix, greedy": full_prefix(model, parameters, placed, given.tokens),
        "GIT, greedy": git(streams, given.tokens, 1),
        "GIT, beam 3": git(streams, given.tokens, 3),
    }
    # These runs compile; not counted.
    assert np.array_equal(runs["cached, greedy"](), runs["full prefix, greedy"]()), "the two ways differ"
    runs["cached, beam 3"]()
    seconds = medians(runs, given.repeats, log=functools.partial(print, file=sys.stderr, flush=True))
    ratios = {
        "full prefix / cached": seconds["full prefix, greedy"] / seconds["cached, greedy"],
        "GIT / cached, greedy": seconds["GIT, greedy"] / seconds["cached, greedy"],
        "GIT / cached, beam 3": seconds["GIT, beam 3"] / seconds["cached, beam 3"],
    }
    versions = {"python": platform.python_version(), "jax": jax.__version__, "device": str(jax.devices()[0])}
    recorded = {**vars(given), "seconds": seconds, "ratios": ratios, "commit": commit(), **versions}
    write_json(pathlib.Path(__file__).with_name("results.json"), recorded)
    print(json.dumps(recorded, indent=2))


if __name__ == "__main__":
    main()
