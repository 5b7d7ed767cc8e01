"""What is read, in what order and in which pieces follows from names and sizes alone; nothing is left out silently."""

import gzip
import os
import pickle
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.data.inputs import Format, plan_pieces
from megatron_aquila.data.streams import Compression
from megatron_aquila.errors import ConfigError, DataError

LINE = b'{"text": "a"}\n'


def write(folder: Path, *names: str, data: bytes = LINE) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def named(folder: Path, *inputs: str, **plan: Any) -> list[str]:
    pieces = plan_pieces([f"{folder}/{name}" for name in inputs], **plan)
    return [str(path.relative_to(folder)) for piece in pieces for path in piece.paths]


def test_files_globs_and_folders_in_order(tmp_path: Path) -> None:
    write(
        tmp_path, "b/2.jsonl", "b/10.json", "b/deep/x.ndjson.gz", "a.jsonl", "b/.hidden/x.jsonl", "b/_SUCCESS", "b/.crc"
    )
    assert named(tmp_path, "b") == ["b/10.json", "b/2.jsonl", "b/deep/x.ndjson.gz"]
    assert named(tmp_path, "b", "a.jsonl") == ["b/10.json", "b/2.jsonl", "b/deep/x.ndjson.gz", "a.jsonl"]
    assert named(tmp_path, "*.jsonl", "b/*") == ["a.jsonl", "b/10.json", "b/2.jsonl"]
    assert named(tmp_path, "**/*.jsonl") == ["a.jsonl", "b/2.jsonl"]
    assert named(tmp_path, "b/_SUCCESS", input_format="jsonl") == ["b/_SUCCESS"], "who names it means it"
    pieces = plan_pieces([str(tmp_path), "-"], piece_bytes=20)
    assert [piece.index for piece in pieces] == list(range(5)), "each of 14 bytes"


@given(
    sizes=st.lists(st.integers(0, 20), max_size=12), piece_bytes=st.integers(20, 60), texts=st.sets(st.integers(0, 11))
)
def test_small_files_share_a_piece(sizes: list[int], piece_bytes: int, texts: set[int]) -> None:
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name, f"{i}.{'txt' if i in texts else 'json'}") for i in range(len(sizes))]
        for path, size in zip(paths, sizes, strict=True):
            path.write_bytes(b"\n" * size)
        pieces = plan_pieces([str(path) for path in paths], piece_bytes=piece_bytes)
    assert [path for piece in pieces for path in piece.paths] == paths, "in their order, none lost"
    for index, piece in enumerate(pieces):
        each = [sizes[int(path.stem)] for path in piece.paths]
        assert (piece.index, piece.num_bytes) == (index, sum(each))
        assert len(each) == 1 or sum(each) <= piece_bytes
        assert len({path.suffix for path in piece.paths}) == 1
    for left, right in pairwise(pieces):
        assert left.format is not right.format or left.num_bytes + sizes[int(right.path.stem)] > piece_bytes


def test_formats_by_name_or_as_asked(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "lines.json", "b.md", "c.TXT", "d.json.gz")
    write(tmp_path, "array.json", "array.json.gz", data=b"\xef\xbb\xbf\n [" + LINE + b"]")
    write(tmp_path, "empty.json", data=b"")
    (tmp_path / "damaged.json.gz").write_bytes(b"no gzip")

    def format_of(name: str, **plan: Any) -> str:
        (piece,) = plan_pieces([f"{tmp_path}/{name}"], **plan)
        return piece.format

    found = {name: format_of(name) for name in sorted(os.listdir(tmp_path))}
    lines, array, text = Format.JSON_LINES, Format.JSON_ARRAY, Format.TEXT_FILE
    assert found == {
        **dict.fromkeys(["a.jsonl", "d.json.gz", "damaged.json.gz", "empty.json", "lines.json"], lines),
        **dict.fromkeys(["array.json", "array.json.gz"], array),
        **dict.fromkeys(["b.md", "c.TXT"], text),
    }
    assert format_of("b.md", text_documents="line") is Format.TEXT_LINE
    assert format_of("a.jsonl", input_format="text", text_documents="blank-line") is Format.TEXT_PARAGRAPH
    (piece,) = plan_pieces(["-"])
    assert (piece.format, piece.path, piece.num_bytes) == (lines, Path("-"), 0)
    assert plan_pieces(["-"], input_format="json-array")[0].format is array


def test_pieces_of_a_large_file(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "a.jsonl.gz", "a.txt", data=LINE * 10)
    pieces = plan_pieces([f"{tmp_path}/a.jsonl", f"{tmp_path}/a.jsonl.gz", f"{tmp_path}/a.txt"], piece_bytes=60)
    assert [(p.index, p.start, p.stop, p.num_bytes, p.lines_before) for p in pieces[:3]] == [
        (0, 0, 60, 60, 0), (1, 60, 120, 60, None), (2, 120, 140, 20, None),
    ]  # fmt: skip
    assert [(p.start, p.stop, p.compression) for p in pieces[3:]] == [
        (0, (tmp_path / "a.jsonl.gz").stat().st_size, Compression.GZIP),
        (0, 140, Compression.NONE),
    ]
    assert pickle.loads(pickle.dumps(pieces)) == pieces, "a worker is sent its piece"
    write(tmp_path, "packed.jsonl", data=gzip.compress(os.urandom(200)))
    with pytest.raises(DataError, match=r"packed.jsonl: holds gzip, but its name does not end so"):
        plan_pieces([f"{tmp_path}/packed.jsonl"], piece_bytes=60)


def test_inputs_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, "mixed/a.jsonl", "mixed/SHA256SUMS.txt", "what/notes.doc", "none/.x")
    for name, why in {
        "nowhere": "nowhere: cannot be read: No such file",
        "*.gz": r"\*.gz: no file is there",
        "none": "none: no file is there; names that begin with . or _ are left out unless named",
        "what": r"notes.doc: its name does not say what it holds \(.jsonl .*say --input-format",
        "mixed": r"mixed: holds records and plain text, .*SHA256SUMS.txt, too; choose by a glob",
    }.items():
        with pytest.raises(DataError, match=why):
            plan_pieces([f"{tmp_path}/{name}"])
    assert named(tmp_path, "mixed", input_format="jsonl") == ["mixed/SHA256SUMS.txt", "mixed/a.jsonl"]


def test_a_pipe_is_an_input_and_is_not_touched(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (piece,) = plan_pieces([f"{tmp_path}/pipe.json"])  # opening it would wait for a writer
    assert (piece.format, piece.num_bytes, piece.lines_before) == (Format.JSON_LINES, 0, 0)


def test_links_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "elsewhere/a.jsonl", "in/b.jsonl")
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    assert named(tmp_path, "in") == ["in/b.jsonl", "in/linked/a.jsonl"]
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        DataError, match=r"in/linked/back: leads back to .*elsewhere, which it lies in; remove the link"
    ):
        named(tmp_path, "in")


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "in/b.jsonl")

    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match="in: cannot be read: Permission denied"):
        named(tmp_path, "in")


@pytest.mark.parametrize(
    ("inputs", "twice", "first"),
    [
        (("in", "in/b.jsonl"), "in/b.jsonl", "in"),
        (("in/*.jsonl", "in/./"), "in/a.jsonl", r"in/\*.jsonl"),
        (("in/b.jsonl", "elsewhere/../in/b.jsonl"), "elsewhere/../in/b.jsonl", "in/b.jsonl"),
        (("linked",), "linked/z.jsonl", "linked"),
        (("in", "linked/a.jsonl"), "linked/a.jsonl", "in"),
    ],
)
def test_no_file_is_read_twice(tmp_path: Path, inputs: tuple[str, ...], twice: str, first: str) -> None:
    write(tmp_path, "in/a.jsonl", "in/b.jsonl", "elsewhere/a.jsonl", "linked/y.jsonl")
    (tmp_path / "linked/a.jsonl").symlink_to(tmp_path / "in/a.jsonl")
    (tmp_path / "linked/z.jsonl").symlink_to("y.jsonl")
    with pytest.raises(ConfigError, match=rf"--input .*/{twice}: the same file is read for --input .*/{first}, and"):
        named(tmp_path, *inputs)
    assert named(tmp_path, "in", "elsewhere") == ["in/a.jsonl", "in/b.jsonl", "elsewhere/a.jsonl"], "a twin is no link"


def test_standard_input_is_there_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--input -: the same file is read for --input -, and"):
        plan_pieces(["-", "-"])


def test_what_is_not_meant(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "ours/b.jsonl", "ours.jsonl")
    skipped = {"leave_out": lambda path: path.name.startswith("ours")}
    assert named(tmp_path, ".", **skipped) == ["a.jsonl"]
    assert named(tmp_path, "*.jsonl", **skipped) == ["a.jsonl"]
    assert named(tmp_path, "ours.jsonl", **skipped) == ["ours.jsonl"], "who names it means it"
