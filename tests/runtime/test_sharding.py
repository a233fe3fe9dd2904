"""The mesh, the placement of arrays on it; a mesh of eight devices trains like one."""

import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tiny_models import FRAMES, QUICK, random_batch, random_parameters, tiny_vlab

from configs.pretrain import get_config
from vlab_jax.compiling import hlo
from vlab_jax.config import stage_config, training_config
from vlab_jax.errors import InputError
from vlab_jax.models.vlab import parameter_shapes
from vlab_jax.runtime import sharding
from vlab_jax.training import stage as stages
from vlab_jax.training.objectives import Objective
from vlab_jax.training.setup import make_model, read_stage

CLIPS, STEPS = 8, 3
pytestmark = pytest.mark.eight_devices

MESHES = {
    "data=8": {"data": 8},
    "fsdp=8": {"data": 1, "fsdp": 8},
    "data=2,fsdp=4": {"data": 2, "fsdp": 4},
    "data=2,fsdp=2,tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
}


def one_device() -> Mesh:
    """A mesh of the first device alone."""
    axis_types = (AxisType.Auto,) * len(sharding.AXES)
    return jax.make_mesh((1, 1, 1), sharding.AXES, axis_types=axis_types, devices=jax.devices()[:1])


def test_there_are_eight_devices_to_test_on():
    assert jax.device_count() == 8


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({}, {"data": 8, "fsdp": 1, "tensor": 1}),
        ({"fsdp": 4}, {"data": 2, "fsdp": 4, "tensor": 1}),
        ({"data": 1, "fsdp": -1, "tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 2}),
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_the_mesh_has_the_requested_axes_and_fills_the_open_one(axes, expected):
    mesh = sharding.make_mesh(**axes)
    assert dict(mesh.shape) == expected
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sharding.batch_divisor(mesh) == expected["data"] * expected["fsdp"]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 3}, "data=3 x fsdp=1 x tensor=1 does not fit 8 devices"),
        ({"data": -1, "fsdp": 3}, "does not fit 8 devices"),
        ({"data": -1, "tensor": 16}, "does not fit 8 devices"),
        ({"data": -1, "fsdp": -1}, "only one of them can be -1"),
        ({"data": -1, "fsdp": 0}, "at least 1"),
        ({"data": -2, "fsdp": -4}, "at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_explained_in_one_line(axes, message):
    with pytest.raises(InputError, match=message) as error:
        sharding.make_mesh(**axes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        # Over [data=2, fsdp=2, tensor=2]: heads and MLP width over `tensor`, the other side over `fsdp`.
        ("vision/transformer/blocks/attention/query_key_value/kernel", (2, 16, 3, 2, 8), (1, "fsdp", 3, "tensor", 4)),
        ("vision/transformer/blocks/attention/query_key_value/bias", (2, 3, 2, 8), (1, 2, "tensor", 3)),
        ("decoder/cross_attention/attend_video/output/kernel", (2, 2, 8, 16), (1, "tensor", 2, "fsdp")),
        ("text/transformer/blocks/mlp/output/kernel", (2, 32, 16), (1, "tensor", "fsdp")),
        (
            "optimizer/1/inner_states/0/inner_state/0/mu/text/transformer/blocks/mlp/output/kernel",
            (2, 32, 16),
            (1, "tensor", "fsdp"),
        ),
        ("text/token_embedding", (40, 16), ("tensor", "fsdp")),
        ("vision/patch_embedding/kernel", (192, 16), ("fsdp", 1)),
        ("video_adapter/before_attention/down/kernel", (2, 16, 8), (1, "fsdp", 2)),
        ("video_adapter/before_attention/up/kernel", (2, 8, 16), (1, 2, "fsdp")),
        ("vision/transformer/blocks/ln_1/norm/scale", (2, 16), (1, 2)),
        ("logit_scale", (), ()),
        # A dimension that its axis does not divide stays whole; so do three heads over two devices.
        ("text/token_embedding", (41, 16), (1, "fsdp")),
        ("vision/transformer/blocks/attention/query_key_value/kernel", (2, 15, 3, 3, 5), (1, 2, 3, 4, 5)),
    ],
)
def test_the_rules_split_what_they_should(path, shape, expected):
    mesh = sharding.make_mesh(**MESHES["data=2,fsdp=2,tensor=2"])
    wanted = PartitionSpec(*(axis if isinstance(axis, str) else None for axis in expected))
    got = NamedSharding(mesh, sharding.partition(path, shape, mesh))
    assert got.is_equivalent_to(NamedSharding(mesh, wanted), len(shape))


def test_a_batch_is_split_over_the_data_and_fsdp_axes_and_keeps_its_order():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    rows = np.arange(8).reshape(8, 1)
    placed = sharding.to_global({"rows": rows}, mesh)["rows"]
    assert placed.shape == (8, 1)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 1)}
    assert np.array_equal(placed, rows)


def test_published_sizes_divide_over_eight_devices():
    """Each device holds an eighth of the big kernels, so about an eighth of the whole model."""
    mesh = sharding.make_mesh(data=1, fsdp=8)
    model = make_model(get_config("l14"), mesh)
    shapes = parameter_shapes(model, model.frames)
    placed = sharding.shardings(shapes, mesh)
    whole, held = 0, 0
    for leaf, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(placed), strict=True):
        whole += leaf.size
        held += int(np.prod(place.shard_shape(leaf.shape)))
    assert held < 1.03 * whole / 8


MODEL = tiny_vlab(decoder={"blending": "none"})


@functools.cache
def parameters():
    """Random parameters of `MODEL` on the host: from there they are placed without compiling anything."""
    return jax.tree.map(np.asarray, random_parameters(MODEL))


def tiny_stage(mesh: Mesh):
    """Everything is trained, on the video stream, with two objectives and a moving average of the parameters."""
    config = training_config()
    config.frames, config.image_frames = FRAMES, 2
    config.stage.blend = stage_config(
        steps=10,
        batch_size=CLIPS,
        streams=("video",),
        groups=((".*", 1e-2),),
        warmup_steps=0,
        objectives={"contrastive": 1.0, "captioning": 1.0, "masked_lm": 0.0},
        average_decay=0.9,
    )
    return stages.prepare(MODEL, read_stage(config, "blend"), mesh)


def train(mesh: Mesh):
    """Three steps on one batch: the prepared stage, the state after them, and each step's loss."""
    stage = tiny_stage(mesh)
    state = stage.initial(jax.device_put(parameters(), stage.shardings.parameters))
    batch = sharding.to_global({name: np.asarray(value) for name, value in random_batch(CLIPS).items()}, mesh)
    program = stage.step.lower(state, batch).compile(compiler_options=QUICK)
    losses = []
    for _ in range(STEPS):
        state, metrics = program(state, batch)
        losses.append(float(metrics["loss"]))
    return stage, state, losses


@pytest.fixture(scope="module")
def alone():
    """The same steps on one device."""
    return train(one_device())


@pytest.fixture(scope="module", params=["data=2,fsdp=2,tensor=2"])
def spread(request):
    """The mesh's name, the mesh, the prepared stage, the state after training on it, and the losses."""
    mesh = sharding.make_mesh(**MESHES[request.param])
    return request.param, mesh, *train(mesh)


def test_eight_devices_train_like_one(alone, spread):
    _, state, expected = alone
    *_, other, losses = spread
    assert expected[2] < expected[1] < expected[0]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    differences = jax.tree.map(
        lambda one, two: float(np.abs(np.asarray(one) - np.asarray(two)).max()), other.parameters, state.parameters
    )
    assert max(jax.tree.leaves(differences)) < 1e-3


def test_the_state_that_a_step_returns_lies_where_the_rules_say(spread):
    _, mesh, stage, state, _ = spread
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(stage.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    expected = {"fsdp": mesh.shape["fsdp"], "tensor": mesh.shape["tensor"]}
    blocks = state.parameters["vision"]["transformer"]["blocks"]
    kernel = blocks["mlp"]["input"]["kernel"]  # [depth, D, M]
    held = kernel.sharding.shard_shape(kernel.shape)
    assert held == (2, 16 // expected["fsdp"], 32 // expected["tensor"])
    assert len(kernel.sharding.device_set) == 8
    assert blocks["ln_1"]["norm"]["scale"].is_fully_replicated
    if expected["fsdp"] == expected["tensor"] == 1:
        assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))


def test_the_optimisers_state_and_the_moving_average_follow_the_parameters(spread):
    _, _, _, state, _ = spread
    parameters = {
        sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.parameters)
    }
    followers = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.optimizer, state.average)):
        name = sharding.path_name(path)
        owner = [parameter for parameter in parameters if name.endswith("/" + parameter)]
        if owner and leaf.ndim:
            parameter = parameters[max(owner, key=len)]
            assert leaf.sharding.is_equivalent_to(parameter.sharding, leaf.ndim), name
            followers += 1
    assert followers == 3 * sum(parameter.ndim > 0 for parameter in parameters.values())


@pytest.mark.parametrize(
    ("name", "share"), [("data=8", 1), ("fsdp=8", 8), ("data=2,fsdp=4", 4), ("data=2,fsdp=2,tensor=2", 4)]
)
def test_a_device_holds_its_share_of_the_big_kernels_and_of_their_moments(alone, name, share):
    shapes = alone[0].shapes
    places = sharding.shardings(shapes, sharding.make_mesh(**MESHES[name]))
    big = [
        (leaf, int(np.prod(place.shard_shape(leaf.shape))))
        for leaf, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True)
        if leaf.size >= 1000
    ]
    assert len(big) > 20
    for leaf, held in big:
        # What has no side to split over `tensor` is split over `fsdp` alone.
        assert held == leaf.size // share or ("tensor" in name and held == 2 * leaf.size // share)
    assert sum(held for _, held in big) < 1.3 * sum(leaf.size for leaf, _ in big) / share


def test_each_of_eight_devices_holds_an_eighth_of_the_big_kernels_and_of_their_moments():
    """By the bytes that lie there. What is small (norms, biases) lies on each device."""
    stage = tiny_stage(sharding.make_mesh(**MESHES["fsdp=8"]))
    state = stage.initial(jax.device_put(parameters(), stage.shardings.parameters))
    held = dict.fromkeys(jax.devices(), 0)
    leaves = [leaf for leaf in jax.tree.leaves((state.parameters, state.optimizer)) if leaf.size >= 1000]
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert len(leaves) > 30
    assert set(held.values()) == {sum(leaf.nbytes for leaf in leaves) // 8}


BLENDED = tiny_vlab(image_encoder="separate")


def blend_gradient(mesh: Mesh):
    """The loss of `blend`, with every objective, and its gradient, computed on a mesh, both on the host; and what the
    compiled program does on a device."""
    batch = {name: np.asarray(value) for name, value in random_batch(CLIPS).items()}
    rng = np.random.default_rng(5)
    lengths = rng.integers(4, batch["tokens"].shape[1] + 1, (CLIPS, 2)).astype(np.int32)
    questions = rng.integers(1, 30, (CLIPS, 2, batch["tokens"].shape[1])).astype(np.int32)
    batch |= {"question_tokens": questions, "answer_starts": lengths - 2, "question_lengths": lengths}
    weights = {"contrastive": 1.0, "captioning": 1.0, "masked_lm": 1.0, "question_answering": 1.0}
    objective = Objective(weights, ("video", "image"), (0, 2))
    given = jax.tree.map(np.asarray, random_parameters(BLENDED))
    places = sharding.shardings(given, mesh)

    def value(parameters, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return objective(BLENDED, parameters, batch, jax.random.key(0))[0]

    function = jax.jit(
        jax.value_and_grad(value),
        in_shardings=(places, sharding.batch_sharding(mesh)),
        out_shardings=(sharding.replicated(mesh), places),
    )
    arguments = jax.device_put(given, places), sharding.to_global(batch, mesh)
    program = function.lower(*arguments).compile(compiler_options=QUICK)
    loss, gradient = program(*arguments)
    for leaf, place in zip(jax.tree.leaves(gradient), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    return float(loss), jax.tree.map(np.asarray, gradient), hlo.count_program(program.as_text())


@pytest.fixture(scope="module")
def blended_alone():
    return blend_gradient(one_device())


@pytest.fixture(scope="module", params=MESHES)
def blended(request):
    """The mesh's name, and `blend_gradient` on it."""
    return request.param, *blend_gradient(sharding.make_mesh(**MESHES[request.param]))


def test_loss_and_gradients_of_blend_are_the_same_on_every_mesh(blended_alone, blended):
    _, loss, gradient, _ = blended
    assert loss == pytest.approx(blended_alone[0], rel=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(blended_alone[1]))
    for leaf, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(blended_alone[1]), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-5 * largest)


def test_devices_send_parameters_and_their_gradients_and_no_activations(blended_alone, blended):
    """Where the batch is split, no row is multiplied twice; with `fsdp`, each device gathers the kernels for the
    forward and for the backward pass. (Compilers for accelerators reduce and scatter gradients, that for CPUs reduces
    them.)"""
    name, *_, work = blended
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(blended_alone[1]))
    if "tensor" in name:  # which does send activations
        assert work.flops < blended_alone[2].flops / 4
        return
    assert work.flops == pytest.approx(blended_alone[2].flops / 8, rel=0.05)
    assert 0.9 * size < work.payload["all-reduce"] < 2 * size
    if "fsdp" in name:
        assert size < work.payload["all-gather"] < 2.5 * size
    assert work.payload["all-to-all"] < 0.1 * size


def gathered_types(axes: dict[str, int]) -> set[str]:
    """The types of the arrays that a training step asks to be whole on each device."""
    config = training_config()
    config.frames = config.image_frames = 4
    objectives = {"contrastive": 1.0, "captioning": 1.0, "masked_lm": 0.0}
    config.stage.blend = stage_config(batch_size=CLIPS, objectives=objectives)
    mesh = sharding.make_mesh(**axes)
    stage = stages.prepare(tiny_vlab(dtype="bfloat16"), read_stage(config, "blend"), mesh)
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), random_batch(CLIPS))
    text = stage.step.trace(stage.shapes, batch).lower().as_text()
    side = r'\{(?:"tensor")?\}'  # split along nothing, or along an axis of one device
    return set(re.findall(rf"sharding_constraint \S+ <@mesh, \[{side}(?:, {side})*\]> : tensor<(\S+)>", text))


def test_kernels_that_fsdp_splits_are_whole_before_their_products_in_the_compute_type():
    """Else a TPU's compiler makes a ring of small products of each."""
    mlp, attention, table, cross = ("16x32", "32x16"), ("16x3x2x8", "2x8x16"), ("40x16",), ("16x1x2x8", "16x2x2x8")
    patches, adapter = ("192x16",), ("16x8", "8x16")  # the pooled token's projection is of the adapter's shape
    kernels = {f"{shape}xbf16" for shape in (*mlp, *attention, *table, *cross, *patches, *adapter, "16x16")}
    found = gathered_types({"data": 1, "fsdp": 8})
    assert found == kernels, (found - kernels, kernels - found)
    assert gathered_types({"data": 8}) == set()
