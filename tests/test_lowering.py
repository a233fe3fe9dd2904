"""Programs of every size and use are lowered for NVIDIA GPUs and for TPUs, on the CPU: what those refuse is seen here.

Models have two blocks at true widths and lengths, since all blocks are equal. What all sizes share is lowered for one
size: the whole step of each stage, with its optimiser, and masked language modelling. For the other sizes and for the
benchmarks, the loss and its gradient are lowered.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
import numpy as np
import pytest

from configs import benchmarks
from configs.pretrain import get_config
from configs.sizes import SIZES
from experiments.speed.program import one_device
from vlab_jax.compiling.topologies import cudnn_answers
from vlab_jax.models import attention, generation, likelihood
from vlab_jax.models.vlab import STREAMS, parameter_shapes
from vlab_jax.runtime import sharding
from vlab_jax.training import programs
from vlab_jax.training import stage as stages

PLATFORMS = ("cuda", "tpu")
FUSED = "__cudnn$fmha"


@contextlib.contextmanager
def devices_of(platform: str) -> Iterator[None]:
    """Programs are traced as on devices of this platform."""
    with mock.patch.object(sharding, "platform_of", lambda mesh: platform), cudnn_answers():
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
        model = programs.model_of(config, mesh)
        made = stages.prepare(model, config.stage[stage], config, mesh)
        given = stages.batch_shapes(model, config.stage[stage], config)
        return made.step.trace(made.shapes, given).lower(lowering_platforms=(platform,)).as_text()


def lowered_gradient(config, stage: str, platform: str) -> str:
    """The text of the gradient of a stage's loss."""
    # Of the model for this machine, so that both platforms of a size share one cached tree.
    shapes = parameter_shapes(programs.model_of(config, one_device()), config.frames)
    with devices_of(platform):
        model = programs.model_of(config, one_device())
        objective = stages.objective_of(config.stage[stage], config)
        batch = stages.batch_shapes(model, config.stage[stage], config)

        def loss(parameters, batch):
            return objective(model, parameters, batch, jax.random.key(0))

        traced = jax.jit(jax.grad(loss, has_aux=True)).trace(shapes, batch)
        return traced.lower(lowering_platforms=(platform,)).as_text()


def assert_fused(text: str, platform: str) -> None:
    """On a GPU attention is cuDNN's, forward and backward; elsewhere nothing is."""
    assert (FUSED in text) == (platform == "cuda")
    if platform == "cuda":
        assert FUSED + "SoftmaxBackward" in text


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("size", [name for name in SIZES if name != "tiny"])
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


def attentions(config, stage: str):
    """What tells the attention of stages apart: the shapes, and what is read."""
    config = config.copy_and_resolve_references()
    config.stages = (stage,)
    return tuple(stages.attention_shapes_of(programs.model_of(config, one_device()), config))


def fine_tunings() -> dict[str, tuple]:
    """Of the benchmarks' stages, each with other attentions once, at the size of ViT-B/16."""
    found = {}
    for task, known in benchmarks.BENCHMARKS.items():
        for name, benchmark in known.items():
            config = get_config("b16")
            benchmarks.follow(config, task, benchmark)
            found.setdefault((task, attentions(small(config), task)), (f"{task}/{name}", config))
    return dict(found.values())


FINE_TUNINGS = fine_tunings()


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", FINE_TUNINGS)
def test_every_benchmark_lowers_with_its_objective_and_frames(name, platform):
    task = name.partition("/")[0]
    assert_fused(lowered_gradient(FINE_TUNINGS[name], task, platform), platform)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_mixer_that_attends_over_any_number_of_frames_lowers(platform):
    """Its parameters are initialised under `vmap`, where cuDNN takes no lengths of rows."""
    config = small(get_config("b32"))
    config.model.adapter.mixer, config.frames = "attention", 5
    assert_fused(lowered_step(config, "adapt", platform), platform)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_embedding_captioning_and_likelihoods_lower(platform):
    config = small(get_config("b16"))
    config.generation.max_tokens = 8
    with devices_of(platform):
        mesh = one_device()
        for program in programs.uses(config, mesh):
            text = program.trace().lower(lowering_platforms=(platform,)).as_text()
            assert (FUSED in text) == (platform == "cuda"), program.name
        text = lowered_likelihoods(programs.model_of(config, mesh), config, platform)
        assert (FUSED in text) == (platform == "cuda")


def lowered_likelihoods(model, config, platform: str) -> str:
    """Of eight texts of seven tokens for each of two clips."""
    clips, texts = jax.ShapeDtypeStruct((2,), np.int32), jax.ShapeDtypeStruct((2, 8, 7), np.int32)
    prefix = jax.ShapeDtypeStruct((2, 5), np.int32)
    parameters = parameter_shapes(model, config.frames)
    side = model.vision["image_size"]
    video = jax.ShapeDtypeStruct((2, config.frames, side, side, 3), np.uint8)
    image_frames = tuple(range(config.image_frames))
    memory = generation.remember.eval_shape(model, STREAMS, image_frames, parameters, video)
    read = likelihood._read.eval_shape(model, 7, parameters["decoder"], memory, None, prefix, clips)
    counts = jax.ShapeDtypeStruct((2, 8), np.int32)
    traced = likelihood._likelihoods.trace(model, parameters["decoder"], *read, texts, counts)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_what_cudnn_refuses_is_noticed(monkeypatch):
    """Lengths that are not padded: 77 tokens of a text, 197 or 257 of a frame."""
    monkeypatch.setattr(attention, "CUDNN_LENGTH_MULTIPLE", 1)
    with pytest.raises(NotImplementedError, match="Unsupported sequence length"):
        lowered_step(small(get_config("l14")), "clip", "cuda")
