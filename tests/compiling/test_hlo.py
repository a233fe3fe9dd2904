"""Counts of compiled programs whose work is known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vlab_jax.compiling import hlo

ROWS, WIDTH, DEPTH = 16, 32, 5
PRODUCT = 2.0 * ROWS * WIDTH * WIDTH


def work_of(function, *shapes: tuple[int, ...], **options) -> hlo.ProgramCounts:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.count_program(jax.jit(function, **options).lower(*arguments).compile().as_text())


def test_a_product_counts_a_multiply_add_as_two():
    assert work_of(jnp.dot, (ROWS, WIDTH), (WIDTH, WIDTH)).flops == PRODUCT
    assert work_of(lambda x, y: jnp.einsum("bij,bkj->bik", x, y), (3, 4, 8), (3, 5, 8)).flops == 2 * 3 * 4 * 5 * 8


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
    def layers(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    assert work_of(layers, (ROWS, WIDTH), (DEPTH, WIDTH, WIDTH)).flops == DEPTH * PRODUCT


def test_of_a_conditional_the_most_expensive_branch_counts():
    def either(choice, x, kernel):
        return jax.lax.cond(choice[0] > 0, lambda: x @ kernel, lambda: x)

    assert work_of(either, (1,), (ROWS, WIDTH), (WIDTH, WIDTH)).flops == PRODUCT


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("one", "four"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.eight_devices
def test_a_product_over_a_split_side_is_reduced_by_the_devices_that_share_it(mesh):
    places = [NamedSharding(mesh, PartitionSpec(None, "four")), NamedSharding(mesh, PartitionSpec("four", None))]
    whole = NamedSharding(mesh, PartitionSpec())
    work = work_of(jnp.dot, (ROWS, WIDTH), (WIDTH, WIDTH), in_shardings=places, out_shardings=whole)
    assert work.flops == PRODUCT / 4
    assert work.count == {"all-reduce": 1}
    assert work.payload["all-reduce"] == 4 * ROWS * WIDTH
    assert work.sent["all-reduce"] == work.total_sent == 2 * 3 / 4 * 4 * ROWS * WIDTH


@pytest.mark.eight_devices
@pytest.mark.parametrize(("axes", "devices"), [("four", 4), ("one", 2), (("one", "four"), 8)])
def test_gathering_sends_all_parts_but_the_devices_own(mesh, axes, devices):
    split, whole = NamedSharding(mesh, PartitionSpec(axes)), NamedSharding(mesh, PartitionSpec())
    work = work_of(lambda x: x * 2, (ROWS, WIDTH), in_shardings=split, out_shardings=whole)
    assert work.payload["all-gather"] == 4 * ROWS * WIDTH
    assert work.total_sent == (devices - 1) / devices * 4 * ROWS * WIDTH


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", 4),
        ("replica_groups=[2,4]<=[8], dimensions={0}", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, x", 8),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, x", 2),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}, x", 4),
    ],
)
def test_every_spelling_of_groups_is_read(groups, devices):
    line = f"  %x = f32[8]{{0}} all-gather(%p), channel_id=1, {groups}"
    text = f"ENTRY %main (p: f32[2]) -> f32[8] {{\n  %p = f32[2]{{0}} parameter(0)\n{line}\n}}\n"
    assert hlo.count_program(text).sent["all-gather"] == pytest.approx(32 * (devices - 1) / devices)


def test_a_text_that_is_not_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.count_program("nothing")
