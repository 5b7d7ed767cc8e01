"""Every document of every format arrives unchanged, in order, wherever files are cut; all else is named by line."""

import gzip
import io
import json
import re
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_aquila.data import fast_json, splitters
from megatron_aquila.data.inputs import Format, Piece, plan_pieces
from megatron_aquila.data.readers import line_of, read_piece, read_texts
from megatron_aquila.data.records import BadRecord, Document, Kind, ReadOptions, parse_template
from megatron_aquila.data.streams import Compression, LineNumbers
from megatron_aquila.errors import DataError

zstandard, pyarrow, parquet = (
    pytest.importorskip(name, reason="an extra (data)") for name in ("zstandard", "pyarrow", "pyarrow.parquet")
)

GOOD = b'{"text": "one"}\n'
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=12)


def read_all(
    *inputs: Path | str, options: ReadOptions | None = None, **plan: Any
) -> tuple[list[Document], list[BadRecord]]:
    """All documents, their lines as the file counts them, and all bad records."""
    documents, bad, lines = [], [], LineNumbers()
    for piece in plan_pieces([str(path) for path in inputs], **plan):
        for record in read_piece(piece, options or ReadOptions(), lines):
            if isinstance(record, BadRecord):
                bad.append(record)
            else:
                documents.append(record._replace(line=line_of(piece, record.line, lines)))
    return documents, bad


def texts_in(*inputs: Path, **plan: Any) -> list[str]:
    documents, bad = read_all(*inputs, **plan)
    assert not bad
    return [document.texts[0] for document in documents]


@pytest.fixture(params=[True, False], ids=["orjson", "json"])
def any_json(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without orjson: the same documents and the same faults."""
    if not request.param:
        monkeypatch.setattr(fast_json, "orjson", None)


BAD_LINES = {
    "broken": (b'{"text": "a", }\n', Kind.NOT_JSON, "not JSON: Expecting property name"),
    "control character": (b'{"text": "a\tb"}\n', Kind.NOT_JSON, "not JSON: Invalid control character"),
    "two objects": (b'{"text": "a"} {"text": "b"}\n', Kind.NOT_JSON, "not JSON: Extra data"),
    "deep": (b'{"text": ' + b"[" * 100_000 + b"\n", Kind.NOT_JSON, "not JSON: maximum recursion depth"),
    "huge number": (b'{"text": ' + b"9" * 5000 + b"}\n", Kind.NOT_JSON, "not JSON: Exceeds the limit"),
    "an array": (b'["text"]\n', Kind.NOT_AN_OBJECT, "expected an object with the key 'text', got a list; if the file"),
    "a string": (b'"text"\n', Kind.NOT_AN_OBJECT, "expected an object with the key 'text', got a str"),
    "no key": (b'{"body": "a"}\n', Kind.MISSING_KEY, "no key 'text'; it has 'body'; choose with --json-keys"),
    "nothing": (b"{}\n", Kind.MISSING_KEY, "no key 'text'; it has none"),
    "null": (b'{"text": null}\n', Kind.NULL, "'text' is null"),
    "number": (b'{"text": 3}\n', Kind.WRONG_TYPE, "'text' is not a string but a int"),
    "NaN": (b'{"text": NaN}\n', Kind.WRONG_TYPE, "'text' is not a string but a float"),
    "twice": (b'{"text": "a", "text": "b"}\n', Kind.DUPLICATE_KEY, "the key 'text' is there 2 times"),
    "latin-1": (b'{"text": "caf\xe9"}\n', Kind.NOT_UTF8, "not UTF-8: byte 14 of the record is 0xe9"),
    "latin-1 elsewhere": (b'{"x": "caf\xe9", "text": "a"}\n', Kind.NOT_UTF8, "byte 11 of the record is 0xe9"),
    "utf-16": (b"\xff\xfe{\0\n", Kind.NOT_UTF8, "byte 1 of the record is 0xff; it looks like UTF-16"),
    "gzip": (b"\x1f\x8b\x08\n", Kind.NOT_UTF8, "0x8b; it looks like gzip: end the file's name in .gz"),
    "zstd": (b"\x28\xb5\x2f\xfd\n", Kind.NOT_UTF8, "0xb5; it looks like zstd: end the file's name in .zst"),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, Kind.BYTE_ORDER_MARK, "a byte order mark within the file"),
    "lone surrogate": (
        b'{"text": "a\\ud83d"}\n',
        Kind.LONE_SURROGATE,
        r"half a surrogate pair, \\ud83d, at character 2",
    ),
    "too long": (b'{"text": "' + b"x" * 300_000 + b'"}\n', Kind.TOO_LONG, "longer than 200,000 bytes"),
    "cut off": (b'{"text": "tw', Kind.CUT_OFF, "not JSON: Unterminated.*; the file ends within this line: was it cut"),
    "cut character": (b'{"text": "\xe6\x88', Kind.CUT_OFF, "not UTF-8: byte 11.*; the file ends within this line"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
@pytest.mark.usefixtures("any_json")
def test_bad_lines_are_named_and_the_others_arrive(tmp_path: Path, kind: str) -> None:
    line, expected, why = BAD_LINES[kind]
    path = tmp_path / "in.jsonl"
    after = 0 if expected is Kind.CUT_OFF else 2
    path.write_bytes(GOOD * 3 + line + GOOD * after)
    for piece_bytes in (1 << 20, 40, 7):
        options = ReadOptions(max_document_bytes=200_000)
        documents, (bad,) = read_all(path, options=options, piece_bytes=piece_bytes)
        assert [document.line for document in documents] == [1, 2, 3, 5, 6][: 3 + after]
        assert (bad.path, bad.line, bad.kind, bad.ends_piece) == (path, 4, expected, False)
        with (
            pytest.raises(AssertionError) if kind == "too long" else pytest.raises(DataError, match=f"jsonl:4: .*{why}")
        ):
            assert list(read_texts(path, "text")) == ["one"] * 5
        if len(line) > 10_000:
            break


def test_the_table_in_the_documentation(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.count("|") == 5]
    table = {row[0]: row[1] for row in rows if row[0] in set(Kind)}
    assert list(table) == list(Kind)
    for kind, cell in table.items():
        source = re.match(r"`(\{.*?|\[.*?|\\xef.*?)`(.*)", cell)
        if source is None:
            assert kind in {Kind.TOO_LONG, Kind.DAMAGED}
            continue
        line = re.sub(rb"\\x(..)", lambda match: bytes.fromhex(match[1].decode()), source[1].encode())
        path = tmp_path / "in.jsonl"
        path.write_bytes(GOOD + line + (b"" if "ends" in source[2] else b"\n" + GOOD))
        documents, (bad,) = read_all(path)
        assert (len(documents), bad.line, bad.kind) == (1 if "ends" in source[2] else 2, 2, kind)


@pytest.mark.usefixtures("any_json")
def test_what_is_not_bad(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": ""}\r\n',  # a byte order mark before the first line
        b" \t\r\n\n",  # blank lines hold nothing
        '{"text": "\\ud83d\\ude00\u2028\x85\\u0000"}\n'.encode(),
        b'{"x": NaN, "y": -Infinity, "z": 1e999, "text": "NaN"}\n',  # as Python writes them
        b'{"inner": {"text": 1}, "text": "an inner key"}\n',
        b'{"x": 1, "x": 2, "text": "another key twice", "x": "\\ud83d"}\n',
        b'{"text": "last"}',
    ]
    path.write_bytes(b"".join(lines))
    documents, bad = read_all(path)
    expected = ["", "\U0001f600\u2028\x85\0", "NaN", "an inner key", "another key twice", "last"]
    assert [document.texts for document in documents] == [(text,) for text in expected]
    assert [document.line for document in documents] == [1, 4, 5, 6, 7, 8]
    assert not bad
    assert sum(document.num_bytes for document in documents) == path.stat().st_size - len(b"\xef\xbb\xbf" + lines[1])
    assert list(read_texts(path, "text")) == expected


@given(texts=TEXTS, newline=st.sampled_from(["\n", "\r\n", "\n \n"]), ended=st.booleans(), cut=st.integers(1, 60))
@example(texts=["我们", "a"], newline="\r\n", ended=False, cut=1)
@settings(max_examples=25)
def test_pieces_cut_anywhere_are_the_file(texts: list[str], newline: str, ended: bool, cut: int) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=len(text) % 2 == 0) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "in.jsonl")
        path.write_text(newline.join(lines) + newline * ended, encoding="utf-8", newline="")
        whole, bad = read_all(path)
        assert [document.texts[0] for document in whole] == texts
        assert read_all(path, piece_bytes=cut) == (whole, bad) == (whole, [])
        assert texts_in(path, input_format="text", text_documents="line", piece_bytes=cut) == lines


def packed(data: bytes, how: str) -> bytes:
    """In two members or frames, as several writers one after another leave it."""
    half = len(data) // 2
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[how]
    return compress(data[:half]) + compress(data[half:])


DOCUMENTS = [{"title": f"题 {n}", "content": '我们 \\ " {}[], \n' * (n % 7), "n": n} for n in range(3000)]
RAW = {
    "in.jsonl": "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in DOCUMENTS).encode(),
    "lines.json": "".join(json.dumps(d) + "\n" for d in DOCUMENTS).encode(),
    "part-1.json": json.dumps(DOCUMENTS, ensure_ascii=False).encode(),
    "indented.json": b"\xef\xbb\xbf \n" + json.dumps(DOCUMENTS, indent=1).encode() + b"\n",
}


@pytest.mark.parametrize("how", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", RAW)
def test_every_form_gives_the_same_documents(tmp_path: Path, name: str, how: str) -> None:
    path = tmp_path / f"{name}{how}"
    path.write_bytes(packed(RAW[name], how))
    options = ReadOptions(template=parse_template(r"{title}\n{content}"), keep_meta=("n", "none"))
    documents, bad = read_all(path, options=options)
    assert not bad
    assert [d.texts for d in documents] == [(f"{d['title']}\n{d['content']}",) for d in DOCUMENTS]
    assert [d.meta for d in documents] == [{"n": d["n"]} for d in DOCUMENTS]
    assert [d.line for d in documents] == list(range(1, 3001))
    documents, _ = read_all(path, options=ReadOptions(keys=("content", "title")))
    assert [d.texts for d in documents] == [(d["content"], d["title"]) for d in DOCUMENTS]
    assert documents[0].meta is None


def test_parquet_gives_the_same_documents(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(DOCUMENTS), path, row_group_size=700, use_dictionary=["title"])
    pieces = plan_pieces([str(path)])
    assert [(piece.start, piece.stop, piece.lines_before) for piece in pieces] == [
        (n, n + 1, 700 * n) for n in range(5)
    ]
    documents, bad = read_all(path, options=ReadOptions(keys=("content", "title"), keep_meta=("n",)))
    assert not bad
    assert [d.texts for d in documents] == [(d["content"], d["title"]) for d in DOCUMENTS]
    assert [(d.line, d.meta) for d in documents] == [(n + 1, {"n": n}) for n in range(3000)]


def test_parquet_rows_that_are_no_document(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    rows = [{"text": "a", "n": 1}, {"text": None, "n": 2}, {"text": "b" * 50, "n": 3}, {"text": "c", "n": 4}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    documents, bad = read_all(path, options=ReadOptions(max_document_bytes=40))
    assert [(d.texts, d.line) for d in documents] == [(("a",), 1), (("c",), 4)]
    assert [(b.line, b.kind) for b in bad] == [(2, Kind.NULL), (3, Kind.TOO_LONG)]
    _, bad = read_all(path, options=ReadOptions(keys=("n",)))
    assert [b.kind for b in bad] == [Kind.WRONG_TYPE] * 4
    _, bad = read_all(path, options=ReadOptions(keys=("body",)))
    assert (
        str(bad[0])
        == f"{path}:1: no column 'body'; it has 'text', 'n'; choose with --json-keys; all behind this is lost"
    )
    assert [b.ends_piece for b in bad] == [True, True]
    latin = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(b"\0\0\0\0\4\0\0\0\x08\0\0\0"), pyarrow.py_buffer(b"goodcaf\xe9")
    )
    parquet.write_table(pyarrow.table({"text": latin}), path)
    documents, (wrong,) = read_all(path)
    assert (documents[0].texts, wrong.line, wrong.kind) == (("good",), 2, Kind.NOT_UTF8)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"in.parquet: cannot be read: "):
        plan_pieces([str(path)])


BAD_ARRAYS = {
    "wrong elements": (b'[{"text": "a"}, 7, {"text": null}, {"text": "b"}]', 2, [(2, "got a int"), (3, "is null")]),
    "twice": (b'[{"text": "a", "text": "b"}, {"text": "c"}]', 1, [(1, "the key 'text' is there 2 times")]),
    "surrogate": (b'[{"text": "\\udc80"}, {"text": "c"}]', 1, [(1, r"half a surrogate pair, \\udc80")]),
    "latin-1": (b'[{"text": "caf\xe9"}, {"text": "c"}]', 1, [(1, "byte 14 of the record is 0xe9")]),
    "cut character": (b'[{"text": "a"}, {"text": "\xe6\x88', 1, [(2, "the file ends within this element")]),
    "cut element": (b'[{"text": "a"}, {"text": "b"', 1, [(2, "the file ends within this element: was it cut off")]),
    "cut literal": (b'[{"text": "a"}, {"text": tr', 1, [(2, "the file ends within this element: was it cut off")]),
    "cut behind": (b'[{"text": "a"}, {"text": "b"}', 2, [(3, "the file ends behind the element before, without ]")]),
    "cut comma": (b'[{"text": "a"},', 1, [(2, "the file ends within this element")]),
    "cut at once": (b"[", 0, [(1, "the file ends within this element")]),
    "no comma": (
        b'[{"text": "a"} {"text": "b"}]',
        1,
        [(2, r"expected , or \] behind the element before, got '{\"text\"")],
    ),
    "last comma": (b'[{"text": "a"}, ]', 1, [(2, r"expected an element, got '\]'")]),
    "broken": (
        b'[{"text": "a"}, {"text": oops}, {"text": "b"}]',
        2,
        [(2, "not JSON: Expecting value")],
    ),
    "more": (b'[{"text": "a"}] []', 1, [(2, r"the array has ended, but '\[\]' follows")]),
    "deep": (b"[" + b"[" * 90_000 + b"]" * 90_000 + b', {"text": "a"}]', 1, [(1, "not JSON: maximum recursion depth")]),
    "inner brackets": (b'[{"text": "]}", "x": [{}]}, {"text": "a", "x": [}}]', 1, [(2, "not JSON: Expecting value")]),
    "no array": (b'{"text": "a"}', 0, [(1, r"expected \[ and the elements of an array, got '{\"text\"")]),
    "too long": (b'[{"text": "a"}, {"text": "' + b"x" * 3_000_000 + b'"}]', 1, [(2, "longer than 200,000 bytes")]),
}


ENDING = {name for name in BAD_ARRAYS if name.startswith("cut")} | {
    "no comma",
    "last comma",
    "more",
    "too long",
    "no array",
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
@pytest.mark.usefixtures("any_json")
def test_bad_elements_are_named(tmp_path: Path, kind: str) -> None:
    data, good, faults = BAD_ARRAYS[kind]
    path = tmp_path / "part.json"
    path.write_bytes(data)
    documents, bad = read_all(path, options=ReadOptions(max_document_bytes=200_000), input_format="json-array")
    assert len(documents) == good
    for record, (line, why) in zip(bad, faults, strict=True):
        assert record.line == line
        assert re.search(f"part.json:{line}: .*{why}", str(record))
    assert bad[-1].ends_piece == ("lost" in bad[-1].why) == (kind in ENDING)


@given(texts=TEXTS, size=st.integers(1, 9), indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans())
@settings(max_examples=25)
def test_an_array_in_chunks_of_any_size(texts: list[str], size: int, indent: int | None, ascii_only: bool) -> None:
    records = [{"n": number, "deep": [{"x": text}], "text": text} for number, text in enumerate(texts)]
    data = json.dumps(records, indent=indent, ensure_ascii=ascii_only).encode()
    chunks = (data[start : start + size] for start in range(0, len(data), size))
    found = list(splitters.array_elements(chunks, 1000))
    assert [json.loads(source) for _, (source, _), _, _ in found] == records
    assert all(value in (None, record) for record, (_, (_, value), *_) in zip(records, found, strict=True))
    assert sum(num_bytes for _, _, num_bytes, _ in found) <= len(data)


def test_packed_files_that_end_early(tmp_path: Path) -> None:
    for how, tail in ((".gz", 20), (".gz", 3), (".zst", 20), (".zst", 1)):
        path = tmp_path / f"in.jsonl{how}"
        whole = packed(RAW["in.jsonl"], how)
        path.write_bytes(whole[:-tail])
        options = ReadOptions(keys=("content",))
        documents, (bad,) = read_all(path, options=options)
        assert len(documents) == bad.line - 1 > 2500, "what came before the damage is read"
        assert (bad.kind, bad.ends_piece) == (Kind.DAMAGED, True)
        assert f"stream is cut off: the file ends at byte {len(whole) - tail:,}, within it" in str(bad)
        path.write_bytes(whole[: len(whole) // 2] + b"\0" * 40 + whole[len(whole) // 2 + 40 :])
        documents, bads = read_all(path, options=options)
        assert bads[-1].kind is Kind.DAMAGED
        assert "stream is broken before byte" in bads[-1].why
        path.write_bytes(b"")
        assert "cut off: the file ends at byte 0" in read_all(path)[1][0].why
        path.write_bytes(GOOD)
        assert "stream is broken before byte 16" in read_all(path)[1][0].why


def test_packed_files_with_more_than_data(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD) + b"\0" * 100_000)  # filled up
    assert texts_in(path) == ["one"]
    path = tmp_path / "in.jsonl.zst"
    skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    path.write_bytes(skippable + zstandard.compress(GOOD) + zstandard.compress(b"") + skippable)
    assert texts_in(path) == ["one"]


def test_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes("\ufeffone\r\n two\u2028\r\n \t\r\n\n\n三\n四".encode())
    assert texts_in(path) == ["one\r\n two\u2028\r\n \t\r\n\n\n三\n四"]
    assert texts_in(path, text_documents="line") == ["one", " two\u2028", "三", "四"]
    documents, _ = read_all(path, text_documents="blank-line")
    assert [(d.texts[0], d.line) for d in documents] == [("one\r\n two\u2028", 1), ("三\n四", 6)]
    path.write_bytes(b"")
    assert texts_in(path) == [""]
    assert texts_in(path, text_documents="line") == texts_in(path, text_documents="blank-line") == []
    path.write_bytes(b"a\nb\xff\n\nc\n")
    assert [(bad.line, bad.kind) for bad in read_all(path)[1]] == [(1, Kind.NOT_UTF8)]
    documents, bad = read_all(path, text_documents="line")
    assert ([d.texts[0] for d in documents], [b.line for b in bad]) == (["a", "c"], [2])
    documents, bad = read_all(path, text_documents="blank-line")
    assert ([d.texts[0] for d in documents], str(bad[0])) == (
        ["c"],
        f"{path}:1: not UTF-8: byte 4 of the record is 0xff",
    )
    body = ReadOptions(keys=("body",))
    assert str(read_all(path, options=body, text_documents="line")[1][0]).startswith(
        f"{path}:1: no key 'body'; it has 'text'"
    )
    path.write_bytes(b"abc\nd\n\n" + b"wxyz\n" * 2 + b"\nend")
    for documents_are, lines in (("line", [1, 4, 5]), ("blank-line", [1, 4]), ("file", [1])):
        options = ReadOptions(max_document_bytes=2)
        if documents_are == "blank-line":
            options = ReadOptions(max_document_bytes=4)
        _, bad = read_all(path, options=options, text_documents=documents_are)
        assert [b.kind for b in bad] == [Kind.TOO_LONG] * len(bad)
        assert [b.line for b in bad][: len(lines)] == lines


@pytest.mark.parametrize("how", ["", ".gz", ".zst"])
def test_standard_input(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    stream = io.BufferedReader(io.BytesIO(packed(GOOD * 2 + b"oops", how)))  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
    documents, (bad,) = read_all("-")
    assert [(d.path, d.texts[0], d.line) for d in documents] == [(Path("-"), "one", 1), (Path("-"), "one", 2)]
    assert str(bad).startswith("-:3: not JSON")


ANYTHING = st.binary(max_size=200) | st.lists(
    st.sampled_from([b"{", b"}", b"[", b"]", b",", b'"text"', b":", b'"', b"\\", b"\n", b" ", b"\xe6", b"1", b"NaN"])
).map(b"".join)


@pytest.mark.parametrize("form", [form for form in Format if form is not Format.PARQUET])
@given(data=ANYTHING, how=st.sampled_from(["", ".gz", ".zst", "wrong"]), cut=st.integers(0, 30))
@settings(max_examples=20)
def test_no_bytes_break_a_reader(form: Format, data: bytes, how: str, cut: int) -> None:
    compression = {".gz": Compression.GZIP, ".zst": Compression.ZSTD, "wrong": Compression.GZIP}.get(
        how, Compression.NONE
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "in")
        stored = data if how == "wrong" else packed(data, how)
        path.write_bytes(stored[: max(len(stored) - cut, 0)])
        piece = Piece(path, 0, form, compression, 0, path.stat().st_size, path.stat().st_size, 0)
        for record in read_piece(piece, ReadOptions(max_document_bytes=50)):
            assert isinstance(record, Document | BadRecord)
            if isinstance(record, Document):
                record.texts[0].encode()


@given(data=st.binary(max_size=100), start=st.integers(0, 900), length=st.integers(0, 50))
@settings(max_examples=20)
def test_no_bytes_break_the_parquet_reader(data: bytes, start: int, length: int) -> None:
    rows = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "in.parquet")
        path.write_bytes(rows.getvalue()[:start] + data + rows.getvalue()[start + length :])
        with suppress(DataError):
            read_all(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD)
    pieces = plan_pieces([str(path)])
    path.unlink()
    with pytest.raises(DataError, match=r"in.jsonl: cannot be read: No such file"):
        list(read_piece(pieces[0], ReadOptions()))


@pytest.mark.parametrize(("package", "name"), [("zstandard", "in.jsonl.zst"), ("pyarrow", "in.parquet")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"need the {package} package: pip install 'megatron_aquila\[data\]'"):
        read_all(tmp_path / name)


def test_lines_are_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"x\n" * 1000)
    lines = LineNumbers()
    assert [lines.before(path, start) for start in (0, 1, 2, 3, 4, 1999, 1001, 2000)] == [
        0,
        1,
        1,
        2,
        2,
        1000,
        501,
        1000,
    ]
