"""Bytes are handed on whole and in order whatever the chunks they come in, and no more are held than must be."""

import gzip
import io
import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, BinaryIO, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aquila.data.records import Broken, Kind
from megatron_aquila.data.splitters import array_elements, lines
from megatron_aquila.data.streams import (
    Compression,
    line_blocks,
    owned_lines,
    sniffed,
    unpacked,
    whole_lines,
    without_mark,
)

zstandard = pytest.importorskip("zstandard", reason="an extra (data)")

CHUNKS = st.lists(st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\xef\xbb\xbf"]), min_size=1).map(b"".join))


@given(chunks=CHUNKS)
@settings(max_examples=40)
def test_blocks_are_the_lines(chunks: list[bytes]) -> None:
    found = list(line_blocks(iter(chunks), 1000))
    assert [line for block, _ in found for line in block] == b"".join(chunks).split(b"\n")
    assert [last for _, last in found] == [False] * (len(found) - 1) + [True]
    assert len(found[-1][0]) == 1


@given(chunks=CHUNKS, longest=st.integers(0, 6))
@settings(max_examples=40)
def test_long_lines_stay_long(chunks: list[bytes], longest: int) -> None:
    expected = b"".join(chunks).split(b"\n")
    found = [line for block, _ in line_blocks(iter(chunks), longest) for line in block]
    assert len(found) == len(expected)
    for line, whole in zip(found, expected, strict=True):
        assert line == whole if len(whole) <= longest else len(line) > longest


@given(chunks=CHUNKS, size=st.integers(1, 12), cut=st.integers(0, 12), broken=st.booleans())
@settings(max_examples=60)
def test_blocks_of_whole_lines_depend_on_the_bytes_alone(
    chunks: list[bytes], size: int, cut: int, broken: bool
) -> None:
    data = b"".join(chunks)

    def blocks(chunks: list[bytes]) -> list[tuple[bytes, bool]]:
        def until() -> Iterator[bytes]:
            yield from chunks
            if broken:
                raise Broken(Kind.DAMAGED, "as it was told")

        found = []
        with pytest.raises(Broken, match="as it was told") if broken else nullcontext():
            for block in whole_lines(until(), size, 1000):
                found.append(block)
        return found

    found = blocks(chunks)
    assert found == blocks([data]) == blocks([data[:cut], data[cut:]])
    kept = data[: data.rfind(b"\n") + 1] if broken else data
    assert b"".join(block for block, _ in found) == kept
    assert [last for _, last in found] == [False] * (len(found) - (not broken)) + [True] * (not broken)
    whole = [block for block, last in found if not last]
    assert all(block.endswith(b"\n") for block in whole)
    assert all(len(block) >= size and b"\n" not in block[size - 1 : -1] for block in whole[:-1])


@given(chunks=CHUNKS, size=st.integers(1, 6), longest=st.integers(0, 6))
@settings(max_examples=40)
def test_long_lines_stay_long_in_blocks(chunks: list[bytes], size: int, longest: int) -> None:
    expected = b"".join(chunks).split(b"\n")
    found = b"".join(block for block, _ in whole_lines(iter(chunks), size, longest)).split(b"\n")
    assert len(found) == len(expected)
    for line, whole in zip(found, expected, strict=True):
        assert line == whole if len(whole) <= longest else len(line) > longest


@given(chunks=CHUNKS)
@settings(max_examples=40)
def test_one_mark_is_taken_off(chunks: list[bytes]) -> None:
    data = b"".join(chunks)
    assert b"".join(without_mark(iter(chunks))) == data.removeprefix(b"\xef\xbb\xbf")


@given(data=st.lists(st.sampled_from([b"a", b"\n"]), max_size=30).map(b"".join), cuts=st.lists(st.integers(0, 30)))
@settings(max_examples=40)
def test_ranges_own_each_line_once(data: bytes, cuts: list[int]) -> None:
    bounds = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    parts = [b"".join(owned_lines(io.BytesIO(data), *bound)) for bound in pairwise(bounds)]
    assert b"".join(parts) == data
    assert all(part.endswith(b"\n") for part in parts[:-1] if part and data.endswith(b"\n"))


def test_many_small_frames_and_an_empty_stream() -> None:
    for compression, pack in (
        (Compression.GZIP, gzip.compress),
        (Compression.ZSTD, zstandard.ZstdCompressor().compress),
    ):
        frames = b"".join(pack(str(number).encode()) for number in range(2000))
        assert b"".join(unpacked(io.BytesIO(frames), compression)) == b"".join(str(n).encode() for n in range(2000))
        assert list(unpacked(io.BytesIO(pack(b"")), compression)) == []
        stream = cast(BinaryIO, io.BufferedReader(io.BytesIO(frames)))  # type: ignore[arg-type]
        assert (sniffed(stream), stream.read(4)) == (compression, frames[:4])
    assert sniffed(io.BytesIO(b"")) is Compression.NONE


def measured(work: Callable[[], Any]) -> tuple[Any, int]:
    """Its result, and the most bytes it held at once."""
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_file() -> None:
    record = json.dumps({"title": "题", "content": '我们 " {}, ' * 400}, ensure_ascii=False).encode()

    def array(count: int) -> Iterator[bytes]:
        yield b"["
        for _ in range(count // 50):
            yield (record + b",") * 50
        yield record + b"]"

    for split, chunks in ((array_elements, array(2000)), (lines, ((record + b"\n") * 50 for _ in range(40)))):
        count, peak = measured(lambda split=split, chunks=chunks: sum(1 for _ in split(chunks, 1 << 20)))
        assert count in (2000, 2001)
        assert peak < 4 * 50 * len(record), "four chunks of forty"


def test_a_long_line_is_not_held() -> None:
    found, peak = measured(lambda: list(lines((b"x" * 100_000 for _ in range(100)), 50_000)))
    assert [(number, len(line)) for number, line, _, _ in found] == [(1, 50_001)]
    assert peak < 500_000
    ((line, _),), peak = measured(lambda: list(whole_lines((b"x" * 100_000 for _ in range(100)), 1, 50_000)))
    assert len(line) == 100_000
    assert peak < 500_000
