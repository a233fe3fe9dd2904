"""Generated texts equal those of the slow way: the whole prefix through the plain decoder at each step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FRAMES, LENGTH, VOCABULARY, quick_jit, random_parameters, random_video, tiny_vlab

from vlab_jax.models import generation
from vlab_jax.models.decoder import BLENDINGS
from vlab_jax.models.generation import GenerationConfig, generate_texts, text_likelihoods
from vlab_jax.models.vlab import STREAMS
from vlab_jax.runtime import sharding

CLIPS = 3
END = 7


@functools.cache
def made(blending: str = "concat", every: int = 1):
    """A model, its parameters, and the tokens of the streams of some clips."""
    model = tiny_vlab(decoder={"blending": blending, "cross_attention_every": every})
    parameters = random_parameters(model)
    video = random_video(CLIPS)
    visual = quick_jit(
        lambda p: model.apply({"params": p}, video, STREAMS, tuple(range(FRAMES)), method="encode_visual")
    )
    return model, parameters, visual(parameters).streams


@functools.cache
def cache_of(blending: str = "concat", every: int = 1):
    model, parameters, streams = made(blending, every)
    decoder = model.standalone_decoder()
    return quick_jit(lambda p: decoder.apply({"params": p}, streams, method="cache_visual"))(parameters["decoder"])


@functools.cache
def compiled(config: GenerationConfig, blending: str = "concat", every: int = 1):
    model = made(blending, every)[0]
    return quick_jit(lambda p, visual, *prefix: generate_texts(model, config, p, visual, None, *prefix))


def generated(config: GenerationConfig, prefix, lengths, blending="concat", every=1):
    parameters = made(blending, every)[1]["decoder"]
    texts = compiled(config, blending, every)(parameters, cache_of(blending, every), prefix, lengths)
    return generation.GeneratedTexts(*map(np.asarray, texts))


@functools.cache
def plain_decoder(blending: str = "concat", every: int = 1):
    model, parameters, streams = made(blending, every)
    return quick_jit(lambda tokens: model.apply({"params": parameters}, tokens, streams, True, method="decode"))


def next_log_probabilities(rows: list[list[int]], blending="concat", every=1) -> np.ndarray:
    """Log-probabilities of each clip's next token, by the plain decoder over all tokens, padded to one length."""
    tokens = np.zeros((CLIPS, LENGTH), np.int32)
    for row, text in zip(tokens, rows, strict=True):
        row[: len(text)] = text
    logits = np.asarray(plain_decoder(blending, every)(jnp.asarray(tokens)), np.float64)
    last = logits[np.arange(CLIPS), [len(text) - 1 for text in rows]]
    return last - np.log(np.exp(last - last.max(1, keepdims=True)).sum(1, keepdims=True)) - last.max(1, keepdims=True)


def prefixes(seed: int, longest: int) -> tuple[jax.Array, jax.Array, list[list[int]]]:
    """Prefixes of different lengths, padded with tokens that must not have an influence."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, CLIPS)
    tokens = rng.integers(8, VOCABULARY, (CLIPS, longest)).astype(np.int32)
    return (
        jnp.asarray(tokens),
        jnp.asarray(lengths, jnp.int32),
        [t[:n].tolist() for t, n in zip(tokens, lengths, strict=True)],
    )


def slow_greedy(starts: list[list[int]], max_tokens: int, **model) -> tuple[list[list[int]], list[float]]:
    texts, scores = [list(start) for start in starts], [0.0] * CLIPS
    done = [False] * CLIPS
    for _ in range(max_tokens):
        log_p = next_log_probabilities(texts, **model)
        for row in range(CLIPS):
            if not done[row]:
                token = int(log_p[row].argmax())
                texts[row].append(token)
                scores[row] += log_p[row, token]
                done[row] = token == END
    return [text[len(start) :] for text, start in zip(texts, starts, strict=True)], scores


def slow_beams(starts, max_tokens: int, beams: int, penalty: float, **model):
    """Beam search on lists, one clip's beams at a time, that never stops early."""
    alive = [[(0.0, [])] for _ in range(CLIPS)]
    done = [[] for _ in range(CLIPS)]
    for step in range(1, max_tokens + 1):
        grown = [[] for _ in range(CLIPS)]
        for beam in range(beams):
            rows = [starts[c] + (alive[c][beam][1] if beam < len(alive[c]) else []) for c in range(CLIPS)]
            log_p = next_log_probabilities(rows, **model)
            for clip in range(CLIPS):
                if beam < len(alive[clip]):
                    score, text = alive[clip][beam]
                    grown[clip] += [(score + log_p[clip, token], [*text, token]) for token in range(VOCABULARY)]
        for clip in range(CLIPS):
            candidates = sorted(grown[clip], key=lambda pair: -pair[0])[: 2 * beams]
            done[clip] += [(score / step**penalty, text) for score, text in candidates if text[-1] == END]
            done[clip] = sorted(done[clip], key=lambda pair: -pair[0])[:beams]
            alive[clip] = [pair for pair in candidates if pair[1][-1] != END][:beams]
    for clip in range(CLIPS):
        done[clip] += [(score / max_tokens**penalty, text) for score, text in alive[clip]]
    return [max(texts, key=lambda pair: pair[0]) for texts in done]


def assert_texts(texts: generation.GeneratedTexts, expected: list[list[int]]) -> None:
    assert [row[:length].tolist() for row, length in zip(texts.tokens, texts.lengths, strict=True)] == expected
    assert not any(row[length:].any() for row, length in zip(texts.tokens, texts.lengths, strict=True))


@pytest.mark.parametrize(("blending", "every"), [(b, 1) for b in BLENDINGS] + [("stacked", 2)])
def test_greedy_decoding_is_that_of_the_plain_decoder_in_every_blending(blending, every):
    model = {"blending": blending, "every": every}
    prefix, lengths, starts = prefixes(0, 3)
    texts = generated(GenerationConfig(5, END), prefix, lengths, **model)
    expected, scores = slow_greedy(starts, 5, **model)
    assert_texts(texts, expected)
    np.testing.assert_allclose(texts.scores, scores, atol=1e-4)


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 1000), shape=st.sampled_from([(1, 4), (2, 1), (3, 3)]))
def test_greedy_decoding_is_that_of_the_plain_decoder_for_any_prefix(seed, shape):
    longest, room = shape
    prefix, lengths, starts = prefixes(seed, longest)
    expected, scores = slow_greedy(starts, room)
    texts = generated(GenerationConfig(room, END), prefix, lengths)
    assert_texts(texts, expected)
    np.testing.assert_allclose(texts.scores, scores, atol=1e-4)


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 1000),
    case=st.sampled_from([(1, 4, 2, 0.0), (2, 3, 3, 0.7), (3, 4, 4, 1.0), (2, 3, 3, 1.0)]),
)
def test_beam_search_is_that_of_plain_lists(seed, case):
    longest, room, beams, penalty = case
    prefix, lengths, starts = prefixes(seed, longest)
    texts = generated(GenerationConfig(room, END, beams, penalty), prefix, lengths)
    expected = slow_beams(starts, room, beams, penalty)
    assert_texts(texts, [text for _, text in expected])
    np.testing.assert_allclose(texts.scores, [score for score, _ in expected], atol=1e-4)


def test_with_all_beams_the_likeliest_text_is_found():
    """As many beams as texts of two tokens: an exhaustive search finds no better one."""
    prefix, lengths, starts = prefixes(5, 1)
    texts = generated(GenerationConfig(2, END, VOCABULARY, 0.0), prefix, lengths)
    first = next_log_probabilities(starts)
    best = first[:, END].copy()
    for token in set(range(VOCABULARY)) - {END}:
        second = next_log_probabilities([[*start, token] for start in starts])
        best = np.maximum(best, first[:, token] + second.max(axis=1))
    np.testing.assert_allclose(texts.scores, best, atol=1e-4)


def test_likelihoods_are_those_of_the_plain_decoder():
    prefix, lengths, starts = prefixes(1, 3)
    rng = np.random.default_rng(0)
    texts = rng.integers(8, VOCABULARY, (CLIPS, 4, 3)).astype(np.int32)
    counts = rng.integers(1, 4, (CLIPS, 4)).astype(np.int32)
    counts[0, 0] = 0
    model, parameters, _ = made()
    prefix_arrays = np.asarray(prefix), np.asarray(lengths)
    ours = text_likelihoods(model, parameters["decoder"], cache_of(), None, prefix_arrays, (texts, counts))
    for text in range(4):
        expected = np.zeros(CLIPS)
        for place in range(3):
            log_p = next_log_probabilities([s + texts[c, text, :place].tolist() for c, s in enumerate(starts)])
            counted = place < counts[:, text]
            expected += np.where(counted, log_p[np.arange(CLIPS), texts[:, text, place]], 0.0)
        expected[counts[:, text] == 0] = -np.inf
        np.testing.assert_allclose(ours[:, text], expected, atol=1e-4)


@pytest.mark.eight_devices
def test_a_sharded_mesh_generates_the_same():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    model, parameters, streams = made()
    repeated = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 4)[:8], streams)
    prefix, lengths, _ = prefixes(2, 2)
    prefix, lengths = jnp.concatenate([prefix] * 4)[:8], jnp.concatenate([lengths] * 4)[:8]
    config, decoder = GenerationConfig(4, END, 3), model.standalone_decoder()

    def run(parameters, streams, prefix, lengths):
        visual = decoder.apply({"params": parameters}, streams, method="cache_visual")
        return generate_texts(model, config, parameters, visual, None, prefix, lengths)

    alone = quick_jit(run)(parameters["decoder"], repeated, prefix, lengths)
    with jax.set_mesh(mesh):
        placed = jax.device_put(parameters["decoder"], sharding.shardings(parameters["decoder"], mesh))
        batch = jax.device_put((repeated, prefix, lengths), sharding.batch_sharding(mesh))
        spread = quick_jit(run)(placed, *batch)
    np.testing.assert_array_equal(alone.tokens, spread.tokens)
    np.testing.assert_allclose(alone.scores, spread.scores, atol=1e-4)


def test_decoding_stops_when_every_text_has_ended():
    steps = []
    logits = jnp.full((2, VOCABULARY), -5.0)
    ending = logits.at[:, END].set(5.0)
    cache = generation.KeyValueCache(jnp.zeros((1, 2, 9, 1, 1)), jnp.zeros((1, 2, 9, 1, 1)), jnp.ones(2, jnp.int32))

    def advance(tokens, cache):
        jax.debug.callback(lambda: steps.append(1))
        return jnp.broadcast_to(ending[:1], (tokens.shape[0], VOCABULARY)), cache

    for search, config in (
        (generation._greedy, GenerationConfig(8, END)),
        (generation._beam_search, GenerationConfig(8, END, 2, 0.0)),
    ):
        steps.clear()
        texts = jax.block_until_ready(search(advance, logits.at[:, 9].set(5.0), cache, config))
        jax.effects_barrier()
        assert len(steps) <= 3, config
        assert texts.tokens[:, :2].tolist() == [[9, END], [9, END]] and texts.lengths.tolist() == [2, 2]


def test_other_clips_and_prefixes_of_one_shape_compile_nothing_new():
    model, parameters, _ = made()
    before = generate_texts._cache_size()
    for seed in (0, 1, 2):
        prefix, lengths, _ = prefixes(seed, 2)
        generate_texts(model, GenerationConfig(3, END, 2), parameters["decoder"], cache_of(), None, prefix, lengths)
    assert generate_texts._cache_size() == before + 1
