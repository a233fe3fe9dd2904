"""Programs of all sizes and uses can be lowered for NVIDIA GPUs and for TPUs; the tests need only a CPU.

They have two blocks at true widths and lengths, since all blocks are equal. One size lowers what all sizes share: the
whole step of each stage, with its optimiser, and masked language modelling. The attentions of every size and benchmark
are lowered with their gradients; so are whole losses, of one size of each kind of tower here, and of the others in the
long tests.
"""

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import jax
import numpy as np
import pytest

from configs import benchmarks
from configs.pretrain import get_config
from configs.sizes import SIZES
from experiments.speed.program import one_device
from vlab_jax.compiling.topologies import mock_cudnn
from vlab_jax.models import attention, generation
from vlab_jax.models.attention import Kernels, attend
from vlab_jax.models.attention_check import AttentionShape
from vlab_jax.models.vlab import STREAMS, parameter_shapes
from vlab_jax.runtime import sharding
from vlab_jax.training import programs, setup
from vlab_jax.training import stage as stages

PLATFORMS = ("cuda", "tpu")
FUSED = "__cudnn$fmha"


@contextlib.contextmanager
def devices_of(platform: str) -> Iterator[None]:
    """Lets programs be traced as on devices of this platform."""
    with mock.patch.object(sharding, "platform_of", lambda mesh: platform), mock_cudnn():
        yield


def small(config, stage: str | None = None):
    """The config with two blocks in each tower, and two clips a batch."""
    config.model.vision.depth = config.model.text.depth = 2
    config.evaluation.batch_size = 2
    for name in config.stages if stage is None else (stage,):
        config.stage[name].batch_size, config.stage[name].micro_batches = 2, 1
    return config


def lowered_step(config, stage: str, platform: str) -> str:
    """The text of a stage's step."""
    with devices_of(platform):
        mesh = one_device()
        model, settings = setup.make_model(config, mesh), setup.read_stage(config, stage)
        made = stages.prepare(model, settings, mesh)
        given = stages.batch_shapes(model, settings)
        return made.step.trace(made.shapes, given).lower(lowering_platforms=(platform,)).as_text()


def lowered_gradient(config, stage: str, platform: str) -> str:
    """The text of the gradient of a stage's loss."""
    # Of the model for this machine, so that both platforms of a size share one cached tree.
    shapes = parameter_shapes(setup.make_model(config, one_device()), config.frames)
    with devices_of(platform):
        model = setup.make_model(config, one_device())
        settings = setup.read_stage(config, stage)
        objective, batch = settings.objective, stages.batch_shapes(model, settings)

        def loss(parameters, batch):
            return objective(model, parameters, batch, jax.random.key(0))

        traced = jax.jit(jax.grad(loss, has_aux=True)).trace(shapes, batch)
        return traced.lower(lowering_platforms=(platform,)).as_text()


def assert_fused(text: str, platform: str) -> None:
    """On a GPU and only there, attention is cuDNN's, forward and backward."""
    assert (FUSED in text) == (platform == "cuda")
    if platform == "cuda":
        assert FUSED + "SoftmaxBackward" in text


def attentions(config, names) -> tuple[AttentionShape, ...]:
    """The shapes of the attentions of some stages, each once."""
    model = setup.make_model(config, one_device())
    return tuple(stages.stage_attention_shapes(model, [setup.read_stage(config, name) for name in names]))


@functools.cache
def lowered_attention(shape: AttentionShape, platform: str) -> str:
    """The text of one attention and its gradient, in half precision."""

    def loss(query, key, value, lengths):
        options = {"causal": shape.causal, "kv_lengths": lengths if shape.lengths else None}
        return attend(query, key, value, **options, kernels=Kernels(platform)).astype(np.float32).sum()

    query, key = (
        jax.ShapeDtypeStruct((2, length, shape.heads, shape.head_width), "bfloat16")
        for length in (shape.queries, shape.keys)
    )
    lengths = jax.ShapeDtypeStruct((2,), np.int32)
    with mock_cudnn():
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(query, key, key, lengths)
        return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("size", [name for name in SIZES if name != "tiny"])
def test_every_attention_of_every_size_lowers(size, platform):
    config = get_config(size)
    shapes = attentions(config, config.stages)
    assert len(shapes) >= 4
    for shape in shapes:
        assert_fused(lowered_attention(shape, platform), platform)


KINDS_OF_TOWERS = ("l14", "eva_g14", "eva02_b16")


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    "size",
    [pytest.param(name, marks=() if name in KINDS_OF_TOWERS else pytest.mark.long) for name in SIZES if name != "tiny"],
)
def test_every_published_size_lowers(size, platform):
    config = small(get_config(size))
    text = config.model.text
    assert (text.context_length, text.width // text.heads) == (77, 64)  # so one size lowers masked language modelling
    config.stage.blend.objectives.masked_lm = 0.0
    assert_fused(lowered_gradient(config, "blend", platform), platform)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("stage", ["clip", "adapt", "blend"])
def test_every_stage_lowers_with_all_of_its_objectives(stage, platform):
    assert_fused(lowered_step(small(get_config("b32")), stage, platform), platform)


def fine_tunings() -> dict[str, list]:
    """The configs of the benchmarks at the size of ViT-B/16, by task."""
    found = {}
    for task, known in benchmarks.BENCHMARKS.items():
        for benchmark in known.values():
            config = get_config("b16")
            benchmarks.follow(config, task, benchmark)
            found.setdefault(task, []).append(config)
    return found


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("task", benchmarks.BENCHMARKS)
def test_every_benchmark_lowers_with_its_objective_and_frames(task, platform):
    configs = fine_tunings()[task]
    for shape in {shape for config in configs for shape in attentions(config, [task])}:
        assert_fused(lowered_attention(shape, platform), platform)
    assert_fused(lowered_gradient(small(configs[0]), task, platform), platform)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_mixer_that_attends_over_any_number_of_frames_lowers(platform):
    """Its parameters are initialised under `vmap`, where cuDNN refuses lengths."""
    config = small(get_config("b32"))
    config.model.adapter.mixer, config.frames = "attention", 5
    assert_fused(lowered_step(config, "adapt", platform), platform)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_embedding_captioning_and_likelihoods_lower(platform):
    config = small(get_config("b16"))
    config.generation.max_tokens = 8
    with devices_of(platform):
        mesh = one_device()
        for program in programs.inference_programs(config, mesh):
            text = program.trace().lower(lowering_platforms=(platform,)).as_text()
            assert (FUSED in text) == (platform == "cuda"), program.name
        text = lowered_likelihoods(setup.make_model(config, mesh), config, platform)
        assert (FUSED in text) == (platform == "cuda")


def lowered_likelihoods(model, config, platform: str) -> str:
    """The text of the likelihoods of eight texts of seven tokens for each of two clips."""
    clips, texts = jax.ShapeDtypeStruct((2,), np.int32), jax.ShapeDtypeStruct((2, 8, 7), np.int32)
    prefix = jax.ShapeDtypeStruct((2, 5), np.int32)
    parameters = parameter_shapes(model, config.frames)
    side = model.vision["image_size"]
    video = jax.ShapeDtypeStruct((2, config.frames, side, side, 3), np.uint8)
    image_frames = tuple(range(config.image_frames))
    cache = generation.cache_visual.eval_shape(model, STREAMS, image_frames, parameters, video)
    read = generation._prefill_clips.eval_shape(model, 7, parameters["decoder"], cache, None, prefix, clips)
    counts = jax.ShapeDtypeStruct((2, 8), np.int32)
    traced = generation._log_likelihoods.trace(model, parameters["decoder"], *read, texts, counts)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_unpadded_lengths_are_refused_by_cudnn(monkeypatch):
    """77 tokens of a text, 197 or 257 of a frame."""
    monkeypatch.setattr(attention, "CUDNN_LENGTH_MULTIPLE", 1)
    with pytest.raises(NotImplementedError, match="Unsupported sequence length"):
        lowered_step(small(get_config("l14")), "clip", "cuda")
