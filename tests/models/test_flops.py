"""The analytic count of FLOPs equals the compiler's, for models so wide that nearly all FLOPs are of products."""

import jax
import jax.numpy as jnp
import pytest
from tiny_models import tiny_vlab

from vlab_jax.models.flops import Workload, forward_flops, step_flops
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.training.objectives import Objective

TOWER = {"width": 512, "depth": 2, "heads": 8, "mlp_width": 2048, "embed_width": 256}
VISION = {"image_size": 64, "patch_size": 16, **TOWER}
TEXT = {"vocab_size": 1000, "context_length": 16, **TOWER}
CLIPS, FRAMES, QUESTIONS = 2, 4, 3
ALL = {"contrastive": 1.0, "captioning": 1.0, "masked_lm": 1.0, "question_answering": 1.0}
PARTS = ("vision", "text", "video_adapter", "image_encoder", "decoder")


def wide(**changes) -> VLAB:
    adapter = {"blocks": (0, 1), "width": 256}
    fields = {"vision": VISION, "text": TEXT, "adapter": adapter, "unroll": 2, **changes}
    return tiny_vlab(**fields)


def shapes_of_a_batch():
    length, size = TEXT["context_length"], VISION["image_size"]
    shapes = {
        "video": ((CLIPS, FRAMES, size, size, 3), jnp.uint8),
        "tokens": ((CLIPS, length), jnp.int32),
        "lengths": ((CLIPS,), jnp.int32),
        "clip": ((CLIPS,), jnp.int32),
        "question_tokens": ((CLIPS, QUESTIONS, length), jnp.int32),
        "answer_starts": ((CLIPS, QUESTIONS), jnp.int32),
        "question_lengths": ((CLIPS, QUESTIONS), jnp.int32),
    }
    return {name: jax.ShapeDtypeStruct(*each) for name, each in shapes.items()}


def counted(model, weights, streams, trainable):
    """The compiler's counts of the forward pass alone, and with the gradients of the trainable parts."""
    objective = Objective(weights, streams, (0, 2))
    parameters = parameter_shapes(model, FRAMES)
    batch = shapes_of_a_batch()

    def loss(parameters, batch):
        return objective(model, parameters, batch, jax.random.key(0))[0]

    def gradient(parameters, batch):
        def of_trainable(trainable):
            return loss({**parameters, **trainable}, batch)

        return jax.grad(of_trainable)({name: parameters[name] for name in trainable})

    analyses = (jax.jit(each).lower(parameters, batch).cost_analysis() for each in (loss, gradient))
    return tuple(analysis["flops"] for analysis in analyses)


@pytest.mark.parametrize(
    ("changes", "streams", "trainable"),
    [
        ({}, ("video", "image"), PARTS),
        ({"image_encoder": "separate", "decoder": {"blending": "stacked"}}, ("video", "image"), PARTS),
        ({"adapter": {"blocks": (0, 1), "width": 256, "mixer": "attention"}}, ("video",), ("video_adapter", "decoder")),
        ({"adapter": {"blocks": (0, 1), "width": 256, "before_mlp": True}}, ("video",), ("video_adapter",)),
        ({"adapter": {"blocks": (1,), "width": 256}}, ("video", "image"), PARTS),
        ({"adapter": {"blocks": (), "width": 256}}, ("video", "image"), ("vision", "decoder")),
    ],
)
def test_the_count_is_the_compilers_within_5_percent(changes, streams, trainable):
    model = wide(**changes)
    trainable = tuple(name for name in trainable if name in parameter_shapes(model, FRAMES))
    forward, step = counted(model, ALL, streams, trainable)
    texts = CLIPS * (2 + QUESTIONS)
    work = Workload(CLIPS, FRAMES, 2, streams, embedded_texts=CLIPS, decoded_texts=texts, decoder_passes=2)
    assert forward_flops(model, work) == pytest.approx(forward, rel=0.05)
    assert step_flops(model, work, {name: name in trainable for name in PARTS}) == pytest.approx(step, rel=0.05)


def test_adapting_computes_no_gradient_of_clip():
    """The compiler counts the gradient of the adapters, and what flows back through the vision tower to the first of
    them: nothing of the text tower, nothing before that adapter, no gradient of CLIP's kernels."""
    model, trainable = wide(adapter={"blocks": (1,), "width": 256}), ("video_adapter",)
    work = Workload(CLIPS, FRAMES, 2, ("video",), embedded_texts=CLIPS, decoded_texts=0)
    _, adapting = counted(model, {"contrastive": 1.0}, ("video",), trainable)
    assert adapting == pytest.approx(step_flops(model, work, dict.fromkeys(trainable, True)), rel=0.05)
    for part in ("vision", "text"):
        assert step_flops(model, work, dict.fromkeys([*trainable, part], True)) > 1.15 * adapting


def test_a_shared_tower_runs_once_up_to_the_first_adapter():
    """Only where both streams are computed: an image stream alone runs through all blocks."""
    both, video, image = ("video", "image"), ("video",), ("image",)

    def flops(blocks, streams, kind="shared"):
        model = wide(adapter={"blocks": blocks, "width": 256}, image_encoder=kind)
        return forward_flops(model, Workload(CLIPS, FRAMES, 2, streams, embedded_texts=0, decoded_texts=0))

    alone = flops((), image)
    assert flops((1,), image) == flops((0, 1), image) == alone
    added = {blocks: flops(blocks, both) - flops(blocks, video) for blocks in ((0, 1), (1,), ())}
    assert alone > added[(0, 1)] > 1.8 * added[(1,)] > 0
    assert added[()] == 2.0 * CLIPS * 2 * VISION["width"] * VISION["embed_width"]  # the projection
    assert flops((1,), both, "separate") == flops((1,), video) + alone


def test_a_published_size_counts_as_much_as_is_published():
    """ViT-B/16 at 224 px: 17.6 G multiply-adds an image, in timm's table of models."""
    vision = {"image_size": 224, "patch_size": 16, "width": 768, "depth": 12, "heads": 12, "mlp_width": 3072}
    model = tiny_vlab(vision={**vision, "embed_width": 512}, adapter={"blocks": ()})
    image = Workload(1, 1, 1, ("video",), embedded_texts=0, decoded_texts=0)
    assert forward_flops(model, image) == pytest.approx(2 * 17.6e9, rel=0.01)


def test_blocks_without_adapter_or_cross_attention_do_without_their_flops():
    """The compiler counts both branches of a condition, of which one runs."""
    work = Workload(4, 8, 2, ("video",), embedded_texts=0, decoded_texts=4)
    none, one, both = (forward_flops(wide(adapter={"blocks": blocks}), work) for blocks in ((), (1,), (0, 1)))
    assert one - none == pytest.approx(both - one) and both > one
    every, second = (forward_flops(wide(decoder={"cross_attention_every": n}), work) for n in (1, 2))
    assert every > second


def test_streams_and_gradients_that_are_not_computed_cost_nothing():
    work = Workload(4, 8, 2, ("video",), embedded_texts=0, decoded_texts=0)
    video = forward_flops(wide(), work)
    assert forward_flops(wide(), Workload(4, 8, 2, ("video", "image"), 0, 0)) > video
    assert step_flops(wide(), work, {"vision": False, "video_adapter": False}) == video
    assert forward_flops(wide(adapter={"blocks": ()}), work) < video
