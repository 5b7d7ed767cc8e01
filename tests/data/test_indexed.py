"""The format is Megatron-LM's byte for byte, and damage is refused when a data set is opened, not in mid-training."""

import hashlib
import json
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.data.indexed import (
    CODE_OF_DTYPE,
    IndexedDataset,
    IndexedDatasetWriter,
    token_dtype,
)
from megatron_aquila.errors import DataError

MADE_BY_BUILDER = ["u8", "i8", "i16", "u16_multi", "i32", "i64", "i32_multimodal", "i32_zerolen", "i32_nodocs"]


def rewrite(source: IndexedDataset, prefix: Path) -> None:
    """Copy sequence by sequence through the writer."""
    with IndexedDatasetWriter(prefix, source.dtype, multimodal=source.modes is not None) as writer:
        for first, end in zip(source.document_indices, source.document_indices[1:], strict=False):
            for number in range(first, end):
                writer.add_sequence(source[number], mode=0 if source.modes is None else int(source.modes[number]))
            writer.end_document()


@pytest.mark.parametrize("name", MADE_BY_BUILDER)
def test_megatron_files_are_rewritten_byte_for_byte(megatron_fixtures: Path, tmp_path: Path, name: str) -> None:
    source = IndexedDataset(megatron_fixtures / f"api_{name}")
    rewrite(source, tmp_path / name)
    for end in ("bin", "idx"):
        assert (tmp_path / f"{name}.{end}").read_bytes() == (megatron_fixtures / f"api_{name}.{end}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{name}.{end}" for end in ("bin", "idx", "manifest.json")
    ], "temporary files remain"


def test_megatron_files_read_as_megatron_reads_them(megatron_fixtures: Path) -> None:
    for name, expected in json.loads((megatron_fixtures / "expected_indexed.json").read_text()).items():
        dataset = IndexedDataset(megatron_fixtures / name)
        if "peer_open_error" in expected:  # the peer cannot open what it wrote; we can
            assert len(dataset) == 0
            continue
        assert dataset.dtype == np.dtype(expected["dtype"])
        assert dataset.sequence_lengths.tolist() == expected["sequence_lengths"]
        assert dataset.document_indices.tolist() == expected["document_indices"]
        assert (dataset.modes is None) == ("modes" not in expected)
        assert dataset.modes is None or dataset.modes.tolist() == expected["modes"]
        for number, tokens in expected["sequences_first_last"].items():
            assert dataset[int(number)].tolist() == tokens
        if "partial_get" in expected:
            part = expected["partial_get"]
            assert dataset.get(part["sequence"], part["offset"], part["length"]).tolist() == part["tokens"]
        digest = hashlib.sha256(dataset.tokens.astype("<i8").tobytes()).hexdigest()
        assert digest == expected["sha256_all_tokens_as_int64_le"]


@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 127), max_size=5), max_size=3), max_size=6),
    code=st.sampled_from(sorted(CODE_OF_DTYPE.values())),
    multimodal=st.booleans(),
)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], code: int, multimodal: bool
) -> None:
    dtype = next(dtype for dtype, number in CODE_OF_DTYPE.items() if number == code)
    prefix = tmp_path_factory.mktemp("round") / "data"
    with IndexedDatasetWriter(prefix, dtype, multimodal=multimodal) as writer:
        for document in documents:
            for mode, tokens in enumerate(document):
                writer.add_sequence(np.array(tokens, dtype=dtype), mode=mode if multimodal else 0)
            writer.end_document()
    dataset = IndexedDataset(prefix)
    assert dataset.dtype == dtype
    assert [dataset[i].tolist() for i in range(len(dataset))] == [tokens for d in documents for tokens in d]
    assert np.diff(dataset.document_indices).tolist() == [len(document) for document in documents]
    modes = [mode for document in documents for mode in range(len(document))]
    assert dataset.modes is None or dataset.modes.tolist() == modes


def test_documents_at_once_equal_documents_one_by_one(tmp_path: Path) -> None:
    lengths = np.array([3, 0, 2, 0, 1])
    tokens = np.arange(6)
    for multimodal in (False, True):
        with IndexedDatasetWriter(tmp_path / "once", np.uint16, multimodal=multimodal) as once:
            once.add_documents(tokens[:3], lengths[:2])
            once.add_documents(tokens[3:], lengths[2:])
        with IndexedDatasetWriter(tmp_path / "each", np.uint16, multimodal=multimodal) as each:
            for start, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
                if length > 0:
                    each.add_sequence(tokens[start : start + length])
                each.end_document()
        for end in ("bin", "idx"):
            assert (tmp_path / f"once.{end}").read_bytes() == (tmp_path / f"each.{end}").read_bytes()


def test_uint16_where_megatron_uses_it() -> None:
    assert [token_dtype(size) for size in (4096, 65499, 65500, 100008)] == ["<u2", "<u2", "<i4", "<i4"]


@pytest.mark.parametrize("tokens", [[70000], [-1], [1.5], [[1, 2]], [True]])
def test_tokens_that_do_not_fit_are_refused(tmp_path: Path, tokens: list[object]) -> None:
    with (
        pytest.raises(DataError, match=r"70000|-1|float64|dimension|bool"),
        IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer,
    ):
        writer.add_sequence(np.array(tokens))
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_outside_the_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="complex128"):
        IndexedDatasetWriter(tmp_path / "data", np.complex128)


def test_the_folder_is_made(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "new" / "folder" / "data", np.uint16) as writer:
        writer.add_sequence([1, 2])
        writer.end_document()
        assert writer.num_tokens == 2
    assert IndexedDataset(tmp_path / "new" / "folder" / "data")[0].tolist() == [1, 2]


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/data.bin: cannot be written: (Not a directory|File exists)"):
        IndexedDatasetWriter(tmp_path / "file" / "data", np.uint16)


def test_a_full_disk_leaves_no_final_name(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with (
            pytest.raises(DataError, match=r"cannot be written.*nothing was published"),
            IndexedDatasetWriter(tmp_path / "data", np.int64) as writer,
        ):
            writer.add_sequence(np.zeros(50_000, dtype=np.int64))
        with (
            pytest.raises(DataError, match=r"cannot be written.*nothing was published"),
            IndexedDatasetWriter(tmp_path / "data", np.int64) as writer,
        ):
            writer.add_documents(
                np.zeros(10_000, dtype=np.int64), np.ones(10_000, dtype=np.int64)
            )  # 80 kB, then the index
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_writer_leaves_the_old_data_set(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "data", np.int32) as writer:
        writer.add_sequence([1, 2])
        writer.end_document()
    with pytest.raises(ZeroDivisionError), IndexedDatasetWriter(tmp_path / "data", np.int32) as writer:
        writer.add_sequence([3, 1 // 0])
    assert IndexedDataset(tmp_path / "data")[0].tolist() == [1, 2]
    assert len(list(tmp_path.iterdir())) == 3


def cut(end: str, size: int) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}.{end}")
        path.write_bytes(path.read_bytes()[:size])

    return damage


def patch(offset: int, value: bytes) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}.idx")
        data = bytearray(path.read_bytes())
        data[offset : offset + len(value)] = value
        path.write_bytes(data)

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no index": (lambda prefix: Path(f"{prefix}.idx").unlink(), r"idx: cannot be read: No such file"),
    "no tokens": (lambda prefix: Path(f"{prefix}.bin").unlink(), r"bin: cannot be read: No such file"),
    "empty index": (cut("idx", 0), "does not hold MMIDIDX"),
    "index cut in the header": (cut("idx", 20), "cut off in the header"),
    "index cut": (cut("idx", 60), r"60 bytes, but 3 sequences and 3 document boundaries take 94"),
    "magic": (patch(0, b"M2"), "does not hold MMIDIDX"),
    "version": (patch(9, b"\x02"), "version 2 at offset 9"),
    "dtype code": (patch(17, b"\x63"), "unknown dtype code 99 at offset 17"),
    "dtype another": (patch(17, b"\x04"), "sequence 1 has length 1 and byte offset 4"),
    "length negative": (patch(34, struct.pack("<i", -5)), "sequence 0 has length -5"),
    "length huge": (patch(42, struct.pack("<i", 10**9)), r"bin: 12 bytes, but .* describes 2000000006"),
    "offset": (patch(46 + 16, struct.pack("<q", 4)), "sequence 2 has length 3 and byte offset 4"),
    "boundary start": (patch(70, struct.pack("<q", 1)), "document boundaries do not run from 0 to 3"),
    "boundary order": (patch(78, struct.pack("<q", 9)), "document boundaries do not run from 0 to 3"),
    "boundary end": (patch(86, struct.pack("<q", 2)), "document boundaries do not run from 0 to 3"),
    "count": (patch(18, struct.pack("<Q", 2**63)), "bytes, but 9223372036854775808 sequences"),
    "tokens half": (cut("bin", 6), r"bin: 6 bytes, but .* describes 12"),
    "tokens one byte short": (cut("bin", 11), r"bin: 11 bytes, but .* describes 12"),
    "tokens too many": (lambda prefix: Path(f"{prefix}.bin").write_bytes(bytes(14)), r"bin: 14 bytes"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_at_open(tmp_path: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    prefix = tmp_path / "data"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_sequence([1, 2])
        writer.add_sequence([3])
        writer.end_document()
        writer.add_sequence([4, 5, 6])
        writer.end_document()
    IndexedDataset(prefix)
    damage(prefix)
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("index", "offset", "length"), [(1, 0, None), (-1, 0, None), (0, 2, 2), (0, -1, 1), (0, 0, -1)]
)
def test_reads_outside_a_sequence(tmp_path: Path, index: int, offset: int, length: int | None) -> None:
    with IndexedDatasetWriter(tmp_path / "data", np.uint8) as writer:
        writer.add_sequence([1, 2, 3])
        writer.end_document()
    with pytest.raises(IndexError, match="it has"):
        IndexedDataset(tmp_path / "data").get(index, offset, length)


def test_a_document_must_be_ended(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="the last document was not ended, at 1 sequences"),
        IndexedDatasetWriter(tmp_path / "data", np.uint8) as writer,
    ):
        writer.add_sequence([1])
    assert list(tmp_path.iterdir()) == []


def test_a_sequence_longer_than_the_format_holds(tmp_path: Path) -> None:
    long = np.broadcast_to(np.uint8(1), 2**31)  # a byte of memory
    for add in (
        lambda writer: writer.add_sequence(long),
        lambda writer: writer.add_documents(long, np.array([2**31])),
    ):
        with (
            pytest.raises(DataError, match="a sequence of 2147483648 tokens; the format holds up to 2147483647"),
            IndexedDatasetWriter(tmp_path / "data", np.uint8) as writer,
        ):
            add(writer)
    assert list(tmp_path.iterdir()) == []
