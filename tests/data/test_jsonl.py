"""Every kind of line that is no document is named with its file and line; nothing is lost without a word."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.data.jsonl import BLOCK_BYTES, LineBlock, parse_block, read_blocks, read_texts
from megatron_aquila.errors import DataError

GOOD = b'{"text": "one"}\n'
BAD = {
    "broken": (b'{"text": "a", }\n', "not JSON: Expecting property name"),
    "not an object": (b'["text"]\n', "expected an object with the key 'text', got a list"),
    "no key": (b'{"body": "a"}\n', r"no key 'text'; it has 'body'; choose with --json-keys"),
    "nothing": (b"{}\n", "no key 'text'; it has none"),
    "null": (b'{"text": null}\n', "'text' is not a string but a NoneType"),
    "number": (b'{"text": 3}\n', "'text' is not a string but a int"),
    "latin-1": (b'{"text": "caf\xe9"}\n', "not UTF-8: byte 14 of the line is 0xe9"),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, "byte order mark"),
    "blank": (b" \r\n", "the line is blank"),
    "lone surrogate": (b'{"text": "a\\ud83d"}\n', r"'text' has half a surrogate pair, \\ud83d, at character 2"),
    "control character": (b'{"text": "a\tb"}\n', "not JSON: Invalid control character"),
    "deep": (b'{"text": ' + b"[" * 100_000 + b"\n", "not JSON: maximum recursion depth"),
    "huge number": (b'{"text": ' + b"9" * 5000 + b"}\n", "not JSON: Exceeds the limit"),
    "cut off": (b'{"text": "tw', r"not JSON: Unterminated string.*; the file ends within this line: was it cut off\?"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_lines_are_named(tmp_path: Path, kind: str) -> None:
    line, reason = BAD[kind]
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD * 3 + line + (b"" if kind == "cut off" else GOOD * 2))
    (block,) = read_blocks(path)
    documents = parse_block(block, ["text"])
    assert len(documents.texts) == (3 if kind == "cut off" else 5)
    assert [bad.line for bad in documents.bad] == [4]
    with pytest.raises(DataError, match=f"in.jsonl:4: .*{reason}"):
        list(read_texts(path, "text"))


def test_what_is_not_bad(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes('{"text": ""}\r\n{"text": "\\ud83d\\ude00\u2028\x85\\u0000"}\n{"text": "last", "x": NaN}'.encode())
    assert list(read_texts(path, "text")) == ["", "\U0001f600\u2028\x85\0", "last"]


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_every_text_arrives(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("texts") / "in.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=number % 2 == 0) + "\n" for number, text in enumerate(texts)]
    path.write_text("".join(lines), encoding="utf-8")
    assert list(read_texts(path, "text")) == texts


@pytest.mark.parametrize("packed", [False, True])
def test_blocks_cover_the_file(tmp_path: Path, packed: bool) -> None:
    line = b'{"text": "' + b"x" * 100_000 + b'"}\n'
    path = tmp_path / ("in.jsonl.gz" if packed else "in.jsonl")
    path.write_bytes(gzip.compress(line * 30) if packed else line * 30)
    blocks = list(read_blocks(path))
    assert len(blocks) > 2
    assert all(sum(map(len, block.lines)) < BLOCK_BYTES + len(line) for block in blocks)
    assert b"".join(line for block in blocks for line in block.lines) == line * 30
    firsts = [block.first for block in blocks]
    assert firsts == [1 + sum(len(block.lines) for block in blocks[:n]) for n in range(len(blocks))]
    assert blocks[-1].position == path.stat().st_size


def test_several_keys() -> None:
    block = LineBlock(Path("f"), 7, [b'{"a": "1", "b": "2"}\n', b'{"a": "1"}\n'], 0)
    documents = parse_block(block, ["b", "a"])
    assert documents.texts == [("2", "1")]
    assert str(documents.bad[0]).startswith("f:8: no key 'b'")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: cannot be read: No such file"):
        list(read_blocks(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        list(read_blocks(tmp_path))
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(GOOD * 1000)[:-20])
    with pytest.raises(DataError, match=r"cut.gz: cannot be read: Compressed file ended"):
        list(read_blocks(cut))
    wrong = tmp_path / "wrong.gz"
    wrong.write_bytes(GOOD)
    with pytest.raises(DataError, match=r"wrong.gz: cannot be read: Not a gzipped file"):
        list(read_blocks(wrong))
