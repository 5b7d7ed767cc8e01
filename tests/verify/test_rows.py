from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.verify.layout import Layout, is_supported
from megatron_aquila.verify.matrix import AXES, case_of, is_case
from megatron_aquila.verify.rows import claims

LAYOUTS = (
    st.fixed_dictionaries({name: st.sampled_from(list(values)) for name, values in AXES.items()})
    .map(lambda values: values | {"uneven": values["uneven"] and min(values["dp"], values["micro_batch"]) > 1})
    .map(lambda values: values | {"zero_group": values["zero_group"] if values["dp"] * values["cp"] > 2 else None})
    .filter(is_case)
    .map(lambda values: case_of(values).layout)
)


@given(requested=LAYOUTS)
def test_every_row_can_run_and_the_last_is_what_was_asked_for(requested: Layout) -> None:
    found = claims(requested)
    assert len({(claim.layout, claim.twin) for claim in found}) == len(found)
    assert all(is_supported(claim.layout) for claim in found)
    assert all(claim.twin is None or is_supported(claim.twin) for claim in found)
    assert requested in [claim.layout for claim in found]
    layouts = [claim.layout for claim in found]
    for name in {"tp", "pp", "dp", "micro_batch"} & set(requested.options):
        assert Layout(**{name: requested.options[name]}) in layouts, f"{name} alone is not tried"


def test_an_axis_of_degree_one_is_not_tried() -> None:
    assert [claim.axis for claim in claims(Layout(tp=2))] == ["world of one", "tp", "tp + sp"]
    assert [claim.axis for claim in claims(Layout())] == ["world of one"]


def test_uneven_replicas_have_a_row() -> None:
    uneven = Layout(dp=3, micro_batch=2, uneven=True)
    rows = {claim.axis: claim.layout for claim in claims(Layout(tp=2, dp=3, micro_batch=2, uneven=True))}
    assert rows["uneven replicas"] == uneven


def test_a_pipeline_is_held_against_both_references() -> None:
    found = [(claim.axis, claim.twin) for claim in claims(Layout(pp=2, schedule="zb-h1"))]
    assert found == [
        ("world of one", None), ("pp", None), ("pp", Layout()), ("schedule", None), ("schedule", Layout()),
    ]  # fmt: skip


def test_buckets_are_held_against_whole_ones_in_a_fixed_order() -> None:
    *_, buckets, together = claims(Layout(dp=2, small_buckets=True))
    assert buckets.layout == Layout(dp=2, small_buckets=True, deterministic=True)
    assert buckets.twin == Layout(dp=2, deterministic=True)
    assert together.layout == Layout(dp=2, small_buckets=True)


def test_a_schedule_is_proved_on_one_rank_too() -> None:
    """Weight gradients are put off there as well."""
    rows = [(claim.axis, claim.layout, claim.twin) for claim in claims(Layout(tp=2, schedule="zb-h1"))]
    alone = Layout(schedule="zb-h1")
    assert ("schedule", alone, None) in rows
    assert ("schedule", alone, Layout()) in rows


def test_the_host_is_held_against_the_device_bit_for_bit() -> None:
    rows = [(claim.axis, claim.layout, claim.twin) for claim in claims(Layout(tp=2, offload=True))]
    assert ("offload", Layout(tp=2, offload=True), Layout(tp=2)) in rows
    rows = [(claim.axis, claim.layout, claim.twin) for claim in claims(Layout(pp=2, offload_activations=True))]
    assert ("offload activations", Layout(pp=2, offload_activations=True), Layout(pp=2)) in rows


def test_groups_are_held_against_one_group_in_rank_order() -> None:
    asked = Layout(dp=2, cp=2, zero=3, zero_group=2, small_buckets=True)
    rows = [claim for claim in claims(asked) if claim.axis == "ZeRO in groups"]
    cut = Layout(dp=2, cp=2, zero=3, zero_group=2)
    assert [(row.layout, row.twin) for row in rows] == [
        (cut, None),
        (replace(cut, deterministic=True), Layout(dp=2, cp=2, zero=3, deterministic=True)),
    ]
