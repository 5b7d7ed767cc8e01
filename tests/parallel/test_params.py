import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.parallel.context import Group
from megatron_aquila.parallel.params import Part, column_part, replicated_part, row_part, vocab_part

sizes, counts = st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 6)


def groups(size: int) -> list[Group]:
    return [Group("tp", rank, size, tuple(range(size)), None) for rank in range(size)]


def coverage(parts: list[Part]) -> torch.Tensor:
    """How many of the parts hold each element of the logical tensor."""
    (shape,) = {part.global_shape for part in parts}
    count = torch.zeros(shape, dtype=torch.int64)
    for part in parts:
        assert all(o + n <= g for o, n, g in zip(part.offset, part.shape, shape, strict=True)), part
        count[tuple(slice(o, o + n) for o, n in zip(part.offset, part.shape, strict=True))] += 1
    return count


@given(size=sizes, rows=counts, columns=counts)
def test_column_and_row_parts_hold_each_element_once(size: int, rows: int, columns: int) -> None:
    assert (coverage([column_part("w", (rows * size, columns), tp) for tp in groups(size)]) == 1).all()
    assert (coverage([row_part("w", (rows, columns * size), tp) for tp in groups(size)]) == 1).all()


@given(size=sizes, shard=counts, data=st.data())
def test_vocab_parts_hold_each_real_row_once_and_no_padding(size: int, shard: int, data: st.DataObject) -> None:
    vocab_size = data.draw(st.integers(1, size * shard))
    parts = [vocab_part("w", (vocab_size, 3), size * shard, tp) for tp in groups(size)]
    assert (coverage(parts) == 1).all()
    for rank, part in enumerate(parts):
        assert part.local_row == 0
        assert 0 <= part.shape[0] <= shard
        assert part.shape[0] == 0 or part.offset[0] == rank * shard, "a shard's first row is its first token"


def test_replicas_are_numbered_and_only_they_are() -> None:
    parts = [replicated_part("norm", (7,), tp) for tp in groups(4)]
    assert [part.replica for part in parts] == [0, 1, 2, 3]
    assert (coverage([part for part in parts if part.replica == 0]) == 1).all()
    assert {column_part("w", (8, 2), tp).replica for tp in groups(4)} == {0}


def test_a_part_of_a_fused_weight_knows_its_row() -> None:
    part = column_part("up", (8, 2), groups(2)[1], local_row=4)
    assert part == Part(name="up", global_shape=(8, 2), offset=(4, 0), shape=(4, 2), local_row=4)


def test_what_does_not_split_is_refused_by_name() -> None:
    for call in (
        lambda tp: column_part("q_proj", (9, 4), tp),
        lambda tp: row_part("q_proj", (4, 9), tp),
        lambda tp: vocab_part("q_proj", (7, 4), 9, tp),
    ):
        with pytest.raises(AssertionError, match="q_proj: 9 does not split over 2 ranks"):
            call(groups(2)[0])
