"""What layers keep, here and on the host; that it is what the model keeps is traced in tests/verify."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.pipeline.schedules import build_schedule
from megatron_aquila.plan.activations import Divided, LayerActivations
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.recompute import Recompute
from tests.plan.shapes import AQUILA_34B
from tests.plan.test_memory import KINDS, placed

LAYERS = LayerActivations(
    shape=AQUILA_34B,
    grid=RankGrid(tp=4),
    micro_batch=1,
    sequence_parallel=True,
    context_method="ring",
    item=2,
    wide=4,
)


def test_what_is_here_while_layers_pass() -> None:
    layer, hidden = LAYERS.layer(), LAYERS.hidden

    def divided(offloaded: int, *groups: int) -> Divided:
        return replace(LAYERS, offloaded=offloaded).divided(6, Recompute(groups=groups))

    def parted(*here: int, away: int, passing: int) -> Divided:
        return Divided(here, away=away, taken=away, passing=passing)

    some = (0, layer, layer)
    assert divided(0) == parted(*(6 * [layer]), away=0, passing=0)
    assert divided(2) == parted(*some, *some, away=2 * layer, passing=layer), "the other one left long ago"
    assert divided(6) == divided(7) == parted(*(6 * [0]), away=6 * layer, passing=2 * layer)
    assert divided(1) == parted(0, *(5 * [layer]), away=layer, passing=layer)
    assert divided(0, 2, 3) == parted(hidden, 0, hidden, 0, 0, layer, away=0, passing=0), "of a group its input"
    assert divided(3, 3, 3) == parted(*(6 * [0]), away=2 * hidden, passing=2 * hidden)
    assert divided(1, 2) == parted(0, 0, *(4 * [layer]), away=hidden, passing=hidden)


def test_a_pinned_buffer_of_each_layer_is_a_power_of_two() -> None:
    layer = LAYERS.layer()
    taken = 1 << (layer - 1).bit_length()
    assert layer < taken < 2 * layer
    found = replace(LAYERS, offloaded=2, pinned=True).divided(6, Recompute())
    assert found == Divided((0, layer, layer) * 2, away=2 * layer, taken=2 * taken, passing=layer), (
        "only the host's is so"
    )


@pytest.mark.parametrize(("name", "chunks"), KINDS)
@given(pp=st.integers(1, 4), microbatches=st.integers(1, 12))
def test_the_host_has_room_for_all_that_is_away_at_once(name: str, chunks: int, pp: int, microbatches: int) -> None:
    memory = replace(placed(name, pp, chunks, microbatches), offload_activations=1)
    for rank, program in build_schedule(name, pp, microbatches, chunks).items():
        held = most = 0
        for action in program:
            away = memory._sizes.divided(action.stage, Recompute()).away
            held += {"F": away, "I": -away, "B": -away, "W": 0}[action.op]
            most = max(most, held)
        planned = memory.host_of_rank(rank).activations
        assert most == planned
