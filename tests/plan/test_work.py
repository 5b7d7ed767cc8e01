"""What a pass goes through; that it is what a stage does is traced in tests/verify."""

import pytest

from megatron_aquila.plan.recompute import KEEP_ALL, Recompute, RecomputePlan
from megatron_aquila.plan.stages import StagePlan
from megatron_aquila.plan.work import Passes, Work

FORWARD = ["embedding", "qkv", "attention", "out", "gate_up", "swiglu", "down", "head"]


def works(op: str, groups: tuple[int, ...] = (), *, layers: int = 1, **settings: bool) -> list[Work]:
    recompute = RecomputePlan(((Recompute(groups=groups),),)) if groups else KEEP_ALL
    settings = {"keeps_logits": False, "fuse_main_grads": True} | settings
    return list(Passes(stages=StagePlan((range(layers),), (0,)), recompute=recompute, **settings).works(op, 0, 0))


def test_backward_is_forward_reversed_and_weight_gradients_are_the_linears() -> None:
    assert [work.part for work in works("F")] == FORWARD
    assert [work.part for work in works("B")] == [work.part for work in works("I")] == FORWARD[::-1]
    assert [work.part for work in works("W")] == ["head", "down", "gate_up", "out", "qkv"]
    assert [work.place for work in works("F")] == [0, 3, None, 4, 5, None, 6, 8], "norms are 1, 2 and 7"


def test_a_group_runs_again_but_for_its_last_matrix() -> None:
    found = [(work.op, work.layer, work.part) for work in works("B", (2,), layers=3) if work.layer is not None]
    kept, again, backward = found[:6], found[6:17], found[17:]
    assert {(op, layer) for op, layer, _ in kept} == {("B", 2)}
    assert [(op, layer, part) for op, layer, part in again] == [
        ("R", layer, part) for layer in (0, 1) for part in FORWARD[1:-1] if (layer, part) != (1, "down")
    ]
    assert [layer for _, layer, _ in backward] == [1] * 6 + [0] * 6
    assert {work.op for work in works("W", (2,), layers=3)} == {"W"}, "what is owed is there"


@pytest.mark.parametrize("keeps_logits", [True, False])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("ops", ["FB", "FIW"])
def test_every_gradient_is_complete_once_a_microbatch(keeps_logits: bool, fuse: bool, ops: str) -> None:
    deeds = [
        (work.place, deed)
        for op in ops
        for work in works(op, keeps_logits=keeps_logits, fuse_main_grads=fuse)
        for deed in work.deeds
    ]
    for place in (0, 3, 4, 5, 6, 8):
        assert deeds.count((place, "add")) == deeds.count((place, "done")) == 1
        assert deeds.index((place, "add")) < deeds.index((place, "done"))
        again = 1 if place == 0 or (place == 8 and not keeps_logits) else 2  # forward, and for the input's gradient
        assert deeds.count((place, "read")) == again


def test_who_adds_and_when() -> None:
    by_part = {work.part: work.deeds for work in works("B")}
    assert by_part["down"] == by_part["out"] == ("add", "done", "read")
    assert by_part["qkv"] == by_part["gate_up"] == ("read", "add", "done")
    assert by_part["head"] == ("done",), "forward has added"
    unfused = {work.part: work.deeds for work in works("B", fuse_main_grads=False)}
    assert unfused["down"] == ("read", "add", "done"), "autograd adds when the linear is done"
    assert unfused["head"] == ("add", "done")
