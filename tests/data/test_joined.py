"""Lines that are joined without a Python object each are the documents, and the bad lines, that Python finds."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.data import readers, streams
from megatron_aquila.data.encoders import GigatokenEncoder, ReferenceEncoder, divided
from megatron_aquila.data.inputs import plan_pieces
from megatron_aquila.data.native import INDEX_BUILDER
from megatron_aquila.data.readers import read_joined, read_piece
from megatron_aquila.data.records import BadRecord, Document, Join, Joined, ReadOptions
from megatron_aquila.data.tokenizer import load_tokenizer

OPTIONS = ReadOptions(max_document_bytes=200)
HOSTILE = [
    b'{"text": "a"}',
    b' {"id": [1, -2.5e+3, {"x": null}], "text" : "\xe4\xb8\xad\xe6\x96\x87\\u4e2d\\ud83d\\ude00/\\/", "t": true}\t\r',
    b'{"text": ""}',
    b"",
    b" \t\r",
    b"\x0b",
    b'{"text": "a", "text": "b"}',
    b'{"text": "a", "x": {"text": "b"}}',
    b'{"x": "\\"text\\": ", "text": "\x7f"}',
    b'{"\\u0074ext": "a"}',
    b'{"\\u0074ext": "a", "text": "b"}',
    b'{"text": null}',
    b'{"text": 3}',
    b'{"body": "a"}',
    b'["a"]',
    b'{"text": "a"} x',
    b'{"text": "a",}',
    b'{"text": "a"',
    b'{"text": "tab\tin it"}',
    b'{"text": "\\ud83d"}',
    b'{"text": "a", "x": "\\ud83d"}',
    b'{"text": "\\ude00\\ud83d"}',
    b'{"text": "caf\xe9"}',
    b'{"text": "\xed\xa0\x80"}',
    b'{"text": "\xc0\xaf\xf5\x80\x80\x80"}',
    b'{"text": "\xf0\x9f\x98\x80\xe0\xa0\x80\xef\xbf\xbf\xc2\x80"}',
    b'\xef\xbb\xbf{"text": "a"}',
    b'{"text": "a\\u0001b"}',
    b'{"text": "a\\u0002b"}',
    b'{"text": "\\u0000\\b\\f\\r\\t\\\\\\""}',
    b'{"text": "\\x"}',
    b'{"text": "\\u12g4"}',
    b'{"text": "a", "x": NaN}',
    b'{"text": "a", "x": 01}',
    b'{"text": "a", "x": -}',
    b'{"text": "a", "x": 1.}',
    b'{"text": "a", "x": 1e400}',
    b'{"text": "a", "x": nul}',
    b'{"text": "a", "x": ' + b"[" * 70 + b"]" * 70 + b"}",
    b'{"text": "a", "x": 1' + b"0" * 70 + b"}",
    b'{"text": "' + b"long " * 50 + b'"}',
    b"{}",
    b"{",
]


@pytest.fixture(scope="module")
def encoder(tokenizer_files: dict[str, Path]) -> GigatokenEncoder:
    if INDEX_BUILDER != "C++ extension":
        pytest.skip("lines are joined only where the C++ extension is built")
    pytest.importorskip("gigatoken")
    return GigatokenEncoder(load_tokenizer("AquilaTokenizer", **tokenizer_files))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def join(encoder: GigatokenEncoder) -> Join:
    made = encoder.joiner("text", OPTIONS.max_document_bytes, 300)
    assert made is not None
    return made


def found(path: Path, join: Join | None) -> tuple[list[Any], int]:
    """Texts and bad records in their order, and the bytes of what is good."""
    (piece,) = plan_pieces([str(path)])
    records: list[Any] = []
    num_bytes = 0
    for record in read_piece(piece, OPTIONS) if join is None else read_joined(piece, OPTIONS, join):
        if isinstance(record, Joined):
            texts = divided(record.text, 1 << 30)
            assert len(texts) == record.documents
            records += texts
        else:
            records += record.texts if isinstance(record, Document) else [record]
        num_bytes += 0 if isinstance(record, BadRecord) else record.num_bytes
    return records, num_bytes


def test_every_kind_of_line_alone(tmp_path: Path, join: Join) -> None:
    path = tmp_path / "in.jsonl"
    for line in HOSTILE:
        path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
        assert found(path, join) == found(path, None), line
    taken = [line for line in HOSTILE if join(line + b"\n", 0)[0].documents == 1]
    assert [HOSTILE.index(line) for line in taken] == [0, 1, 2, 7, 8, 25, 29, 36]


lines = st.one_of(
    st.sampled_from(HOSTILE),
    st.text().map(lambda text: json.dumps({"id": 1, "text": text}).encode()),
    st.text(st.characters(exclude_categories=["Cs"])).map(
        lambda text: json.dumps({"text": text, "more": [text]}, ensure_ascii=False).encode()
    ),
    st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")),
    st.tuples(st.sampled_from(HOSTILE), st.integers(0, 60), st.integers(0, 255)).map(
        lambda drawn: drawn[0][: drawn[1]] + bytes([drawn[2]]).replace(b"\n", b"") + drawn[0][drawn[1] + 1 :]
    ),
)


@given(
    lines=st.lists(lines, max_size=8),
    ended=st.booleans(),
    chunk=st.sampled_from([7, 64, 1 << 20]),
    most_alone=st.sampled_from([1, 8]),
)
def test_whatever_the_lines(
    tmp_path_factory: pytest.TempPathFactory, join: Join, lines: list[bytes], ended: bool, chunk: int, most_alone: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "joined.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * ended)
    expected = found(path, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "MOST_ALONE", most_alone)
        patch.setattr(streams, "CHUNK_BYTES", chunk)
        patch.setattr(readers, "BLOCK_BYTES", chunk)
        assert found(path, join) == expected


def test_of_a_block_with_many_lines_for_python_none_is_joined(tmp_path: Path, join: Join) -> None:
    """Each such line ends a batch: forty thousand batches of a line took ten times as long as forty of a thousand."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b", "x": NaN}\n' * 1000)
    (piece,) = plan_pieces([str(path)])
    joined = [record for record in read_joined(piece, OPTIONS, join) if isinstance(record, Joined)]
    assert [record.documents for record in joined] == [1] * readers.MOST_ALONE
    assert found(path, join) == found(path, None)


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\1\2"))))
def test_the_ids_are_the_references(encoder: GigatokenEncoder, texts: list[str]) -> None:
    joiner = encoder.joiner("text", 1 << 20, 1 << 20)
    assert joiner is not None
    joined, _, _ = joiner(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts), 0)
    ours = encoder.encode_joined(joined.text, joined.documents, 5)
    theirs = ReferenceEncoder(encoder.tokenizer).encode(texts, 5)
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert ours.lengths.tolist() == theirs.lengths.tolist()


def test_what_is_refused(join: Join) -> None:
    with pytest.raises(ValueError, match="a start outside the block"):
        join(b"", 1)
