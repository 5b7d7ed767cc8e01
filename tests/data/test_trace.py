"""A trace says what samples were made of: it covers each document's tokens exactly as the samples do."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aquila.data.blend import build_datasets
from megatron_aquila.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_aquila.data.samples import SampleSource
from megatron_aquila.data.segments import SegmentedSource
from megatron_aquila.data.trace import Piece, format_piece, samples_of_document, trace_sample
from megatron_aquila.errors import DataError


def write(prefix: Path, documents: list[list[int]], first: int = 0) -> str:
    """Documents of sequences of the given lengths; all tokens of the data set count up."""
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for lengths in documents:
            for length in lengths:
                writer.add_sequence(np.arange(first, first + length))
                first += length
            writer.end_document()
    return str(prefix)


def source_of(paths: list[str], folder: Path, size: int | None, *, seq_len: int = 5, seed: int = 1) -> SampleSource:
    settings = {"split": "1", "seq_len": seq_len, "cache_path": folder / "cache"}
    source = build_datasets(paths, sizes=(size, 0, 0), seed=seed, **settings).train  # type: ignore[arg-type]
    assert source is not None
    return source


def assert_is_what_was_read(source: SampleSource) -> None:
    """Ids, tokens and bytes of every piece against the sample and the file, and the way back from each document."""
    readers: dict[tuple[str, int], set[int]] = {}
    for sample in range(len(source)):
        pieces = trace_sample(source, sample)
        assert [number for piece in pieces for number in piece.ids] == source[sample].tokens.tolist()
        for piece in pieces:
            dataset = source.datasets[source.names.index(piece.prefix)]
            raw = dataset.bin_path.read_bytes()[slice(*piece.bytes)]
            assert np.frombuffer(raw, dtype=dataset.dtype).tolist() == list(piece.ids)
            assert dataset[piece.sequence][slice(*piece.tokens)].tolist() == list(piece.ids)
            first, end = dataset.document_indices[piece.document : piece.document + 2]
            assert first <= piece.sequence < end
            readers.setdefault((piece.prefix, piece.document), set()).add(sample)
    for dataset in source.datasets:
        for document in range(len(dataset.document_indices) - 1):
            found = samples_of_document(source, document, prefix=dataset.prefix)
            assert found == sorted(readers.get((dataset.prefix, document), set())), (dataset.prefix, document)


@settings(max_examples=25)
@given(
    documents=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=6).filter(
        lambda documents: sum(map(sum, documents)) > 1
    ),
    seq_len=st.integers(1, 7),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_an_epoch_is_every_token_once(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], seq_len: int, epochs: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("trace")
    path = write(folder / "data", documents)
    total = sum(map(sum, documents))
    size = (epochs * total - 1) // seq_len
    source = source_of([path], folder, size, seq_len=seq_len, seed=seed)
    assert_is_what_was_read(source)
    # Inputs (all tokens of a sample but the last, its label) in the order of the index: whole epochs but the tail.
    seen = np.zeros(total, dtype=np.int64)
    for sample in range(len(source)):
        ids = [number for piece in trace_sample(source, sample) for number in piece.ids]
        seen += np.bincount(ids[:-1], minlength=total)
    assert seen.sum() == len(source) * seq_len
    assert seen.max() <= epochs
    if epochs * total - 1 == size * seq_len:  # the samples end with the data: only the last label is no input
        assert (seen == epochs).sum() >= total - 1


def test_blends_and_segments(tmp_path: Path) -> None:
    a = write(tmp_path / "a_text", [[4], [7, 2], [], [9]])
    b = write(tmp_path / "b_text", [[30], [3], [0], [5]], first=500)
    paths = ["1", a, "2", b]
    blend = source_of(paths, tmp_path, 12)
    assert_is_what_was_read(blend)
    later = source_of(paths, tmp_path, 9, seed=2)
    joined = SegmentedSource([(blend, range(7)), (later, range(1, 9))])
    assert_is_what_was_read(joined)
    assert trace_sample(joined, 8) == trace_sample(later, 2)
    assert trace_sample(joined, 8) != trace_sample(blend, 8)
    assert samples_of_document(blend, 0, prefix="b_text") == samples_of_document(blend, 0, prefix=b)
    assert samples_of_document(blend, 2, prefix="a_") == []
    for prefix, message in (
        (None, "blends 2 data sets; name one with --prefix: .*a_text, .*b_text"),
        ("text", "--prefix text: 2 data sets of this name"),
        ("c", "--prefix c: no data set of this name"),
    ):
        with pytest.raises(DataError, match=message):
            samples_of_document(blend, 0, prefix=prefix)


def test_a_data_set_is_found_by_what_its_name_begins_with(tmp_path: Path) -> None:
    """As ``en``, which is a part of ``document`` too."""
    names = ("zh_text_document", "en_text_document", "code_en_text_document")
    paths = [write(tmp_path / name, [[9 * number + 9]]) for number, name in enumerate(names)]
    source = source_of([word for path in paths for word in ("1", path)], tmp_path, 9)
    for prefix, number in (("en", 1), ("zh", 0), ("code", 2), ("en_text", 1), ("zh_text_document", 0), ("code_en", 2)):
        asked = samples_of_document(source, 0, prefix=prefix)
        assert asked == samples_of_document(source, 0, prefix=paths[number]), prefix
    with pytest.raises(DataError, match="--prefix document: 3 data sets of this name"):
        samples_of_document(source, 0, prefix="document")


def test_what_there_is_not(tmp_path: Path) -> None:
    source = source_of([write(tmp_path / "data", [[9], [9]])], tmp_path, 3)
    for sample in (-1, 3):
        with pytest.raises(DataError, match=f"sample {sample}: the run's index has 3, from 0 on"):
            trace_sample(source, sample)
    for document in (-1, 2):
        with pytest.raises(DataError, match=f"data: document {document}: it has 2, from 0 on"):
            samples_of_document(source, document)


def test_a_piece_in_words() -> None:
    piece = Piece(prefix="zh", document=3, sequence=4, tokens=(1, 3), bytes=(12, 20), ids=(7, 8))
    assert format_piece(piece, None) == "zh: document 3, tokens 1 to 3, bytes 12 to 20\n    7 8"
    assert format_piece(piece, lambda ids: f"one\n{len(ids)}").endswith("\n    one 2")
    assert format_piece(piece, lambda _: "a\n" * 99 + "b", width=None).endswith("    a\n" * 99 + "    b")
    assert format_piece(piece, lambda _: "a" * 20 + "b" * 20, width=25).endswith("\n    aaaaaaaaaa ... bbbbbbbbbb")


def test_the_dataset_is_read_only(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "data", [[3]]))
    assert not dataset[0].flags.writeable
