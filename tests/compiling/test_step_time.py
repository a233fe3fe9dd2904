"""The time of a compiled program, from small programs in the format of a TPU's compiler."""

import pytest

from vlab_jax.compiling import hlo, step_time
from vlab_jax.compiling.step_time import KERNEL_FACTOR, ModelPlace, Rates

RATES = Rates(clock=1e9, peak=1e12, memory=1e9, ring=1e6)
TWICE = "jit(on_mesh)/transpose(jvp(VLAB.decode))/decoder/transformer/while/body/blocks/mlp/input/dot_general"


def program(*entry: str, others: str = "") -> str:
    body = "\n".join(f"  {line}" for line in ("%p = f32[1000]{0:T(1024)} parameter(0)", *entry))
    return f"HloModule jit_step\n\n{others}\nENTRY %main (p: f32[1000]) -> f32[1000] {{\n{body}\n}}\n"


def fusion(cycles: int, name: str = TWICE, result: str = "x") -> str:
    config = f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}","iteration_bounds":["1"]}}}}'
    return (
        f"%{result} = f32[1000]{{0:T(1024)}} fusion(%p), kind=kLoop, calls=%fused, "
        f'metadata={{op_name="{name}" stack_frame_id=3}}, {config}'
    )


FUSED = "%fused (q: f32[1000]) -> f32[1000] {\n  %q = f32[1000]{0} parameter(0)\n" + (
    '  ROOT %y = f32[1000]{0} add(%q, %q), backend_config={"estimated_cycles":"7000000"}\n}\n'
)


def loop(times: str, known: str = "") -> tuple[str, str]:
    """A loop around a fusion of 1,000 cycles: its line, and its computations."""
    others = f"""{FUSED}
%limit (l: s32[]) -> pred[] {{
  %l = s32[]{{:T(128)}} parameter(0)
  %most = s32[]{{:T(128)}} constant({times})
  ROOT %lt = pred[] compare(%l, %most), direction=LT
}}

%condition (c: (s32[], f32[1000])) -> pred[] {{
  %c = (s32[]{{:T(128)}}, f32[1000]{{0}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%c), index=0
  ROOT %go = pred[] fusion(%i), kind=kLoop, calls=%limit
}}

%body (b: (s32[], f32[1000])) -> (s32[], f32[1000]) {{
  %b = (s32[]{{:T(128)}}, f32[1000]{{0}}) parameter(0)
  %p = f32[1000]{{0:T(1024)}} get-tuple-element(%b), index=1
  {fusion(1000)}
  %sum = f32[1000]{{0:T(1024)}} all-reduce(%x), replica_groups={{{{0,1}}}}, to_apply=%add
  ROOT %t = (s32[]{{:T(128)}}, f32[1000]{{0}}) tuple(%b, %sum)
}}

%add (one: f32[], two: f32[]) -> f32[] {{
  %one = f32[] parameter(0)
  %two = f32[] parameter(1)
  ROOT %s = f32[] add(%one, %two)
}}
"""
    return f"%w = (s32[]{{:T(128)}}, f32[1000]{{0}}) while(%p), condition=%condition, body=%body{known}", others


def test_a_fusions_cycles_count_once_without_those_of_its_parts():
    time = step_time.estimate_time(program(fusion(2000), others=FUSED), RATES)
    assert time.seconds == pytest.approx(2e-6)
    assert time.sources["compiler"] == time.seconds


def test_a_loop_counts_as_often_as_the_constant_of_its_condition_says():
    line, others = loop("5")
    time = step_time.estimate_time(program(line, others=others), RATES)
    assert time.sources["compiler"] == pytest.approx(5 * 1e-6)
    assert time.sources["collectives"] == pytest.approx(5 * 4000 / 1e6)  # half of it, twice, in a ring of two
    work = hlo.count_program(program(line, others=others))
    assert work.count["all-reduce"] == 5
    assert work.sent["all-reduce"] == 5 * 4000


def test_xlas_own_trip_count_of_a_loop_has_priority():
    line, others = loop("5", known=', backend_config={"known_trip_count":{"n":"3"}}')
    assert step_time.estimate_time(program(line, others=others), RATES).sources["compiler"] == pytest.approx(3e-6)


def test_of_a_condition_the_longer_branch_counts():
    branches = FUSED + "".join(
        f"\n%{name} (b: f32[1000]) -> f32[1000] {{\n  %p = f32[1000]{{0}} parameter(0)\n  ROOT {fusion(cycles)}\n}}\n"
        for name, cycles in (("short", 10), ("long", 4000))
    )
    for order in ("branch_computations={%long, %short}", "true_computation=%short, false_computation=%long"):
        line = f"%c = f32[1000]{{0}} conditional(%p, %p), {order}"
        assert step_time.estimate_time(program(line, others=branches), RATES).seconds == pytest.approx(4e-6)


def kernel(cost: str) -> str:
    return (
        '%k = f32[1000]{0} custom-call(%p), custom_call_target="tpu_custom_call", '
        f'backend_config={{"custom_call_config":{{"body":"TUzvUg"{cost}}}}}'
    )


def test_a_kernel_written_by_hand_is_charged_by_its_flops():
    cost = ',"cost_estimate":{"flops":"50000000","transcendentals":"0","bytes_accessed":"8000"}'
    time = step_time.estimate_time(program(kernel(cost)), RATES)
    assert time.sources["kernels"] == pytest.approx(KERNEL_FACTOR * 50e6 / 1e12)
    assert time.kernels_without_cost == 0


def test_a_kernel_without_cost_is_charged_its_bytes_and_reported():
    time = step_time.estimate_time(program(kernel("")), RATES)
    assert time.sources["kernels"] == pytest.approx(2 * 4000 / 1e9)
    assert time.kernels_without_cost == 1


def test_other_instructions_are_charged_their_bytes_and_asynchronous_ones_nothing():
    sort = "%s = f32[1000]{0} sort(%p), dimensions={0}, to_apply=%lt"
    assert step_time.estimate_time(program(sort), RATES).sources["bytes"] == pytest.approx(2 * 4000 / 1e9)
    asynchronous = [
        "%a = (f32[1000]{0:S(1)}, f32[1000]{0}, u32[]{:S(2)}) copy-start(%p)",
        "%d = f32[1000]{0:S(1)} copy-done(%a)",
        "%g = (f32[1000]{0}, f32[2000]{0}) all-gather-start(%p), replica_groups={{0,1}}, dimensions={0}",
        '%b = f32[1000]{0} custom-call(), custom_call_target="AllocateBuffer"',
    ]
    assert step_time.estimate_time(program(*asynchronous), RATES).seconds == 0
    work = hlo.count_program(program(*asynchronous))
    assert work.payload["all-gather"] == 8000
    assert work.sent["all-gather"] == 4000


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (TWICE, ModelPlace("decoder", "MLP", "backward")),
        (
            "jit(on_mesh)/transpose(jvp(VLAB.encode_visual))/VLAB._video_stream/VLAB._run_from/vision.run_from/transformer/while/"
            "body/closed_call/checkpoint/rematted_computation/blocks/attention/bhlk,bhkd->bhld/dot_general",
            ModelPlace("video stream", "attention", "recomputed"),
        ),
        (
            "jit(on_mesh)/jvp(VLAB.decode)/decoder/transformer/blocks/blocks._insert/CrossAttention/attend/query/dot",
            ModelPlace("decoder", "cross-attention", "forward"),
        ),
        (
            "jit(on_mesh)/jvp(VLAB.encode_visual)/VLAB._image_stream/VLAB._run_from/image_encoder.run_from/ln_post/norm/div",
            ModelPlace("image stream", "rest", "forward"),
        ),
        (
            "jit(on_mesh)/jvp(VLAB.encode_text)/text/transformer/blocks/mlp/output/add",
            ModelPlace("text tower", "MLP", "forward"),
        ),
        ("jit(on_mesh)/transpose(jvp())/reduce_sum", ModelPlace("losses", "", "backward")),
        ("jit(on_mesh)/mul", ModelPlace("optimiser", "", "")),
        ("broadcast.7", ModelPlace("copies", "", "")),
    ],
)
def test_time_is_assigned_to_the_place_in_the_model(name, place):
    assert list(step_time.estimate_time(program(fusion(10, name), others=FUSED), RATES).places) == [place]


def test_a_text_that_is_not_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        step_time.estimate_time("nothing", RATES)
