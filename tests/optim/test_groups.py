"""Laws of the bucket layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.optim.groups import ALIGNMENT, main_dtype, plan_buckets
from megatron_aquila.parallel.params import ParamInfo
from tests.optim.toys import whole

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
infos_strategy = st.lists(
    st.tuples(st.integers(1, 700), st.sampled_from(DTYPES), st.booleans()), min_size=1, max_size=12
).map(
    lambda rows: [
        whole(f"p{i}", torch.zeros(size, dtype=dtype), weight_decay=decays)
        for i, (size, dtype, decays) in enumerate(rows)
    ]
)
bytes_strategy, shards_strategy = st.integers(1, 8000), st.integers(1, 9)


@given(infos=infos_strategy, bucket_bytes=bytes_strategy, num_shards=shards_strategy)
def test_every_parameter_has_one_slot_among_its_like(
    infos: list[ParamInfo], bucket_bytes: int, num_shards: int
) -> None:
    layouts = plan_buckets(infos, bucket_bytes=bucket_bytes, num_shards=num_shards)
    placed = [slot.info for layout in layouts for slot in layout.slots]
    assert sorted(map(id, placed)) == sorted(map(id, infos))
    for layout in layouts:
        assert layout.size == layout.shard_size * num_shards
        assert layout.shard_size % ALIGNMENT == 0
        for slot in layout.slots:
            assert (slot.info.param.dtype, slot.info.weight_decay) == (layout.dtype, layout.weight_decay)
            assert slot.info.stage == layout.slots[0].info.stage
            assert slot.offset % ALIGNMENT == 0
        ends = [slot.offset + slot.info.param.numel() for slot in layout.slots]
        begins = [slot.offset for slot in layout.slots[1:]]
        assert all(begin >= end for end, begin in zip(ends, [*begins, layout.size], strict=True))
        if len(layout.slots) > 1:
            assert ends[-1] * main_dtype(layout.dtype).itemsize <= bucket_bytes
        assert layout.size < ends[-1] + num_shards * ALIGNMENT + ALIGNMENT, "more padding than alignment asks for"


@given(infos=infos_strategy, bucket_bytes=bytes_strategy, num_shards=shards_strategy)
def test_pieces_cover_every_element_once(infos: list[ParamInfo], bucket_bytes: int, num_shards: int) -> None:
    owners = {id(info): torch.zeros(info.param.numel(), dtype=torch.int64) for info in infos}
    for layout in plan_buckets(infos, bucket_bytes=bucket_bytes, num_shards=num_shards):
        offset_of = {id(slot.info): slot.offset for slot in layout.slots}
        for shard in range(num_shards):
            for piece in layout.pieces(shard):
                assert 0 <= piece.start < piece.stop <= layout.shard_size
                assert piece.stop - piece.start == piece.flat.stop - piece.flat.start
                in_bucket = shard * layout.shard_size + piece.start
                assert in_bucket == offset_of[id(piece.flat.info)] + piece.flat.start
                owners[id(piece.flat.info)][piece.flat.start : piece.flat.stop] += 1
    assert all(bool((count == 1).all()) for count in owners.values())


def test_borders_fall_inside_parameters() -> None:
    (layout,) = plan_buckets([whole("w", torch.zeros(20, 13), weight_decay=True)], bucket_bytes=10**6, num_shards=4)
    ranges = [(piece.flat.start, piece.flat.stop) for shard in range(4) for piece in layout.pieces(shard)]
    assert ranges == [(0, 128), (128, 256), (256, 260)]  # 260 elements in shards of 128; the last shard is padding


def test_one_bucket_a_limit_and_larger_parameters_alone() -> None:
    sizes = [100, 100, 1000, 100]
    infos = [whole(str(i), torch.zeros(n), weight_decay=True) for i, n in enumerate(sizes)]
    layouts = plan_buckets(infos, bucket_bytes=4 * 256, num_shards=1)
    assert [[slot.info.name for slot in layout.slots] for layout in layouts] == [["3"], ["2"], ["1", "0"]]


def test_a_bucket_needs_room() -> None:
    with pytest.raises(AssertionError, match="got 0 bytes"):
        plan_buckets([whole("w", torch.zeros(2), weight_decay=True)], bucket_bytes=0, num_shards=1)
