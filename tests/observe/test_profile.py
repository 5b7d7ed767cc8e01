"""The profile's arithmetic on made-up events: overlapping streams count once, shares and gaps make up the wall."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.observe.profile import OPTIMIZER, PRECEDENCE, WINDOW, Gap, Profile, Span, classify, profile_of

Event = dict[str, Any]


def event(name: str, start: float, length: float, *, cat: str = "kernel", lane: int = 7) -> Event:
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": lane, "ts": start, "dur": length}


def window(start: float, length: float) -> Event:
    return event(WINDOW, start, length, cat="user_annotation", lane=1)


GEMM, NCCL = "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL"


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("GEMM", [GEMM, "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "aten::addmm", "aten::bmm", "aten::_scaled_mm"]),
        ("GEMM", ["void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", "void splitKreduce_kernel"]),
        ("attention", ["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "fmha_cutlassF_bf16_aligned"]),
        ("attention", ["void flash_fwd_kernel<Flash_fwd_kernel_traits>", "aten::_scaled_dot_product_flash_attention"]),
        (
            "attention",
            ["void cudnn::fusion::compute_dot_do_o_specialized<true>", "cudnn::fusion::convert_dq_to_16bits"],
        ),
        ("communication", [NCCL, "c10d::_reduce_scatter_base_", "gloo:all_gather", "nccl:send_recv"]),
        ("optimizer", ["aten::_fused_adamw_", "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>"]),
        ("optimizer", ["adamw_update"]),
        ("memory-bound", ["rms_norm_forward", "swiglu_backward", "rope_rotate", "triton_red_fused_add_0"]),
        ("memory-bound", ["Memcpy HtoD", "void at::native::vectorized_elementwise_kernel", "aten::mul"]),
        ("memory-bound", ["aten::comm_hook", "aten::summary"]),
    ],
)
def test_names_are_classified(part: str, names: list[str]) -> None:
    assert {name: classify(name) for name in names} == dict.fromkeys(names, part)


def test_streams_that_overlap_count_once_and_communication_only_where_nothing_hides_it() -> None:
    events = [window(100, 100), event(GEMM, 110, 40), event(NCCL, 130, 40, lane=9), event("swiglu_forward", 180, 10)]
    profile = profile_of(events)
    shares = profile.shares()
    assert shares == pytest.approx(
        {"GEMM": 0.4, "attention": 0, "optimizer": 0, "memory-bound": 0.1, "communication": 0.2, "idle": 0.3}
    )
    assert profile.gaps() == [
        Gap(100, 110, None, GEMM),
        Gap(170, 180, NCCL, "swiglu_forward"),
        Gap(190, 200, "swiglu_forward", None),
    ]
    assert sum(span.stop - span.start for span in profile.spans) / profile.wall == 0.9, "a plain sum would say this"


def test_what_the_update_launches_is_the_optimizer_s_but_for_communication() -> None:
    update = event(OPTIMIZER, 20, 60, cat="gpu_user_annotation")
    elsewhere = event("swiglu_forward", 30, 10, lane=8)
    inside, after = event("vectorized", 25, 10), event("vectorized", 80, 10)
    found = profile_of([window(0, 100), update, inside, elsewhere, after, event(NCCL, 40, 10)]).shares()
    assert found["optimizer"] == pytest.approx(0.1)
    assert found["memory-bound"] == pytest.approx(0.15)  # 5 of elsewhere's are the optimizer's already
    assert found["communication"] == pytest.approx(0.1)


@pytest.mark.parametrize("order", [1, -1])
def test_an_annotation_as_long_as_its_only_kernel_is_around_it(order: int) -> None:
    """The norm's all-reduce is alone on its stream: a trace has the two in any order."""
    both = [event(NCCL, 10, 20), event(OPTIMIZER, 10, 20, cat="gpu_user_annotation")]
    profile = profile_of([window(0, 100), *both[::order]])
    assert profile.shares() == pytest.approx(dict.fromkeys(PRECEDENCE, 0) | {"communication": 0.2, "idle": 0.8})
    assert profile.largest() == [(NCCL, 1, 20)]


def test_operators_of_the_cpu_count_by_self_time() -> None:
    def op(name: str, start: float, length: float, lane: int = 1) -> Event:
        return event(name, start, length, cat="cpu_op", lane=lane)

    events = [window(0, 100), op("aten::linear", 10, 50), op("aten::mm", 20, 10), op("aten::mm", 40, 10)]
    events += [op("aten::mul", 90, 30), op("aten::mm", 200, 9), {"ph": "M", "name": "process_name"}]
    profile = profile_of(events)
    assert not profile.is_device
    assert profile.largest() == [("aten::linear", 1, 30), ("aten::mm", 2, 20), ("aten::mul", 1, 10)]
    assert profile.shares()["GEMM"] == pytest.approx(0.2)
    assert profile.shares()["idle"] == pytest.approx(0.4)
    assert [gap.stop - gap.start for gap in profile.gaps(1)] == [30]


def test_what_a_cpu_s_update_does_in_no_operator_is_the_optimizer_s_but_for_waits() -> None:
    update = event(OPTIMIZER, 20, 60, cat="user_annotation", lane=1)
    inside = event("aten::mul", 30, 10, cat="cpu_op", lane=1)
    waited_for = event("gloo:all_reduce", 60, 40, cat="cpu_op", lane=2)
    profile = profile_of([window(0, 100), update, inside, waited_for])
    shares = profile.shares()
    assert (shares["optimizer"], shares["communication"], shares["idle"]) == pytest.approx((0.4, 0.4, 0.2))
    assert profile.largest(1) == [(OPTIMIZER, 1, 50)]
    assert profile.gaps() == [Gap(0, 20, None, OPTIMIZER)]


def test_a_device_s_kernels_stand_for_its_work_and_the_host_s_operators_do_not() -> None:
    events = [window(0, 10), event("aten::mm", 0, 10, cat="cpu_op", lane=1), event("Memset", 0, 1, cat="gpu_memset")]
    assert profile_of(events).largest() == [("Memset", 1, 1)]


times = st.integers(0, 60)
spans = st.lists(st.tuples(times, st.integers(1, 30), st.sampled_from([GEMM, NCCL, "swiglu_forward", "flash"]), times))


@given(spans)
def test_shares_sum_to_one_and_gaps_to_what_is_idle(drawn: list[tuple[int, int, str, int]]) -> None:
    events = [event(name, start, length, lane=lane % 3) for start, length, name, lane in drawn]
    profile = profile_of([window(10, 40), event("Memset", 20, 1, lane=5), *events])
    shares = profile.shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) >= 0
    busy = {moment for start, length, _, _ in [*drawn, (20, 1, "", 0)] for moment in range(start, start + length)}
    assert shares["idle"] == pytest.approx(len(set(range(10, 50)) - busy) / 40)
    idle = sum(gap.stop - gap.start for gap in profile.gaps(1000))
    assert idle == pytest.approx(shares["idle"] * profile.wall)
    assert sum(time for *_, time in profile.largest(1000)) == sum(span.stop - span.start for span in profile.spans)


def test_the_lines_say_it_in_ms_a_step() -> None:
    spans = (Span(GEMM, "GEMM", 1, 0, 6000), Span("k" * 200, "memory-bound", 2, 8000, 10_000))
    text = "\n".join(Profile(spans, 0, 10_000, is_device=True).lines(2))
    assert "5.00 ms a step: GEMM 60.0 %" in text
    assert "idle 20.0 %" in text
    assert re.search(rf"3\.000  60\.0      1  {GEMM}", text)
    assert re.search(r"2\.000 at 6\.000, after nvjet.*, before k+\.\.\.", text)
    assert max(map(len, text.splitlines())) < 220
