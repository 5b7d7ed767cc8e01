from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.plan.offload import on_host, pinned_bytes, spread


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=20), share=st.floats(0, 1))
def test_it_is_the_share_that_was_asked_for_and_no_bucket_more(sizes: list[int], share: float) -> None:
    chosen = on_host(sizes, share)
    there = [size for size, is_on_host in zip(sizes, chosen, strict=True) if is_on_host]
    here = [size for size, is_on_host in zip(sizes, chosen, strict=True) if not is_on_host]
    assert sum(there) >= share * sum(sizes)
    assert not there or sum(there) - min(there) < share * sum(sizes)
    assert not (there and here) or min(there) >= max(here)


def test_none_all_and_the_first_of_equal_ones() -> None:
    assert on_host([3, 3, 1], 0) == (False, False, False)
    assert on_host([3, 3, 1], 1) == (True, True, True)
    assert on_host([1, 3, 3], 0.4) == (False, True, False)


@given(units=st.integers(0, 90), wanted=st.integers(0, 100))
def test_layers_that_leave_lie_evenly_from_the_first_on(units: int, wanted: int) -> None:
    chosen = sorted(spread(units, wanted))
    assert len(chosen) == min(units, wanted)
    assert chosen[:1] in ([], [0])
    gaps = [after - before for before, after in pairwise([*chosen, units])]
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(size=st.integers(1, 2**50))
def test_a_pinned_buffer_is_the_next_power_of_two(size: int) -> None:
    found = pinned_bytes(size)
    assert size <= found < 2 * size
    assert found.bit_count() == 1


def test_nothing_takes_nothing() -> None:
    assert [pinned_bytes(size) for size in (0, 1, 2, 3, 4, 5)] == [0, 1, 2, 4, 4, 8]
