"""Damage is found: at open what shows there, by ``verify`` every flip. The table in docs/data.md is made here."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aquila.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_aquila.data.manifest import (
    FileFacts,
    Origin,
    TokenizerFacts,
    manifest_path,
    read_manifest,
    remove_manifest,
    write_manifest,
)
from megatron_aquila.data.verify import check_largest_token, hash_file, verify, verify_all, without_manifest
from megatron_aquila.errors import DataError

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
Files = dict[str, bytes]
# Where the parts of the index of `write` lie: 4 sequences with modes, 3 documents.
REGIONS = {
    "magic": (0, 9),
    "version": (9, 17),
    "dtype": (17, 18),
    "number of sequences": (18, 26),
    "number of documents": (26, 34),
    "lengths": (34, 50),
    "offsets": (50, 82),
    "document borders": (82, 114),
    "modes": (114, 118),
}


def write(prefix: Path, *, first: int = 5, vocab_size: int = 20, lines: bytes | None = None) -> Files:
    with IndexedDatasetWriter(prefix, np.uint16, multimodal=True) as writer:
        for document in ([[first, 9], [2]], [[7]], [[8, 1, 0]]):
            for tokens in document:
                writer.add_sequence(tokens)
            writer.end_document()
        tokenizer = TokenizerFacts(kind="AquilaTokenizer", vocab_size=vocab_size, fingerprint="0" * 64)
        writer.origin = replace(Origin.unknown(), tokenizer=tokenizer)
        if lines is not None:
            path = Path(f"{prefix}.meta.jsonl")
            path.write_bytes(lines)
            facts = FileFacts(size=len(lines), sha256=hash_file(path))
            writer.origin = replace(writer.origin, options={"provenance": path.name}, provenance=facts)
    return read(prefix)


def read(prefix: Path) -> Files:
    return {end: Path(f"{prefix}.{end}").read_bytes() for end in ("bin", "idx")}


def opens(prefix: Path) -> bool:
    """Whether it does; nothing but ``DataError`` is raised where not."""
    try:
        IndexedDataset(prefix)
    except DataError as error:
        return str(prefix) not in str(error)  # an error that names no file is as bad as none
    return True


def flips(files: Files, end: str, start: int, stop: int) -> list[Files]:
    """The data set with the lowest and then the highest bit flipped of each byte of a region in turn."""
    damaged = []
    for place in range(start, stop):
        for bit in (0x01, 0x80):
            data = bytearray(files[end])
            data[place] ^= bit
            damaged.append(files | {end: bytes(data)})
    return damaged


def kinds_of_damage(files: Files, other: Files) -> dict[str, list[Files]]:
    """``other`` is a data set of the same sizes and other tokens."""
    resized = {end: [files | {end: files[end][:size]} for size in range(len(files[end]))] for end in ("idx", "bin")}
    kinds = {f"`.{end}` cut off, at every byte": damaged for end, damaged in resized.items()}
    extended = {end: [files | {end: files[end] + bytes(size)} for size in (1, 2, 4, 8)] for end in ("idx", "bin")}
    kinds |= {f"`.{end}` extended by 1, 2, 4 or 8 bytes": damaged for end, damaged in extended.items()}
    kinds["`.bin` of another data set, of another size"] = [files | {"bin": other["bin"][:-2]}]
    kinds["`.bin` of another data set, of the same size"] = [files | {"bin": other["bin"]}]
    kinds["`.bin` and `.idx` exchanged"] = [{"bin": files["idx"], "idx": files["bin"]}]
    for name, (start, stop) in REGIONS.items():
        kinds[f"`.idx`: bits flipped, {name}"] = flips(files, "idx", start, stop)
    kinds["`.bin`: bits flipped"] = flips(files, "bin", 0, len(files["bin"]))
    return kinds


def table(folder: Path) -> list[str]:
    """Rows of how many of each kind of damage are noticed when, out of how many."""
    files, other = write(folder / "data"), write(folder / "other", first=6)
    manifest = manifest_path(folder / "data").read_bytes()
    rows = []
    for kind, damaged in kinds_of_damage(files, other).items():
        noticed = [0, 0, 0]
        for case in damaged:
            for end, data in case.items():
                (folder / f"data.{end}").write_bytes(data)
            remove_manifest(folder / "data")
            noticed[0] += not opens(folder / "data")
            manifest_path(folder / "data").write_bytes(manifest)
            noticed[1] += not opens(folder / "data")
            noticed[2] += len(verify(str(folder / "data")).problems) > 0
        rows.append(f"| {kind} | {' | '.join(f'{count} of {len(damaged)}' for count in noticed)} |")
    return rows


def test_every_kind_of_damage(tmp_path: Path) -> None:
    rows = table(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    assert "\n".join(rows) in page, "docs/data.md: the table of damage is now\n" + "\n".join(rows)
    for row in rows:
        verified, total = row.removesuffix(" |").split(" | ")[-1].split(" of ")
        assert verified == total, row


@settings(max_examples=50)
@given(data=st.data())
def test_no_index_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    prefix = tmp_path_factory.mktemp("fuzz") / "data"
    files = write(prefix)
    remove_manifest(prefix)
    index = bytearray(files["idx"])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(index)))
        index[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    for content in (bytes(index), data.draw(st.binary(max_size=60)), files["idx"][:18] + data.draw(st.binary())):
        Path(f"{prefix}.idx").write_bytes(content)
        if opens(prefix):  # then all that it says can be read
            dataset = IndexedDataset(prefix)
            assert sum(len(dataset[number]) for number in range(len(dataset))) == len(dataset.tokens)


def test_a_manifest_of_another_data_set(tmp_path: Path) -> None:
    write(tmp_path / "data")
    with IndexedDatasetWriter(tmp_path / "other", np.int16) as writer:
        writer.add_documents(np.arange(5), np.array([5]))
    shutil.copy(manifest_path(tmp_path / "data"), manifest_path(tmp_path / "other"))
    message = (
        r"other.manifest.json: contents.dtype is uint16, the files have int16; contents.documents is 3, .* have 1; "
        r"contents.sequences is 4, .* have 1; contents.tokens is 7, .* have 5; contents.idx.size is 118, .*remove the"
    )
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / "other")


def test_what_verify_says(tmp_path: Path) -> None:
    files = write(tmp_path / "data")
    seen: list[int] = []
    verdict = verify(str(tmp_path / "data"), deep=True, report=seen.append)
    assert (verdict.found, verdict.problems) == ("3 documents, 4 sequences, 7 tokens of uint16", ())
    assert verdict.unchecked is None
    assert sum(seen) == len(files["bin"]) + len(files["idx"]) + 7
    (tmp_path / "data.bin").write_bytes(bytes(14))
    (problem,) = verify(str(tmp_path / "data")).problems
    assert problem.startswith(f"{tmp_path}/data.bin: its SHA-256 is ")
    remove_manifest(tmp_path / "data")
    verdict = verify(str(tmp_path / "data"), deep=True)
    assert verdict.problems == ()
    assert verdict.unchecked is not None
    assert verdict.unchecked.startswith(f"no manifest: {tmp_path}/data; whether the bytes are those")
    (problem,) = verify(str(tmp_path / "nowhere")).problems
    assert problem == f"{tmp_path}/nowhere.idx: cannot be read: No such file or directory"


def test_all_that_a_run_reads_at_once(tmp_path: Path) -> None:
    prefixes = [str(tmp_path / name) for name in ("one", "bare", "two")]
    sizes = [sum(map(len, write(Path(prefix), lines=b"where from").values())) for prefix in prefixes]
    Path(f"{prefixes[2]}.meta.jsonl").write_bytes(b"another set's")
    remove_manifest(prefixes[1])
    total, seen = sizes[0] + sizes[2], list[tuple[int, int]]()
    line = verify_all(prefixes, lambda what, done, total: seen.append((done, total)))
    assert line == f"hashed {total:,} bytes: 2 of 3 data sets are what their manifests say"
    assert seen[-1] == (total, total)
    for prefix in prefixes:
        Path(f"{prefix}.bin").write_bytes(bytes(14))
    with pytest.raises(DataError, match=r"one.bin: its SHA-256 is .*\n.*two.bin: its SHA-256 is"):
        verify_all(prefixes)


def test_every_token_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_aquila.data.verify.BLOCK", 2)
    write(tmp_path / "data", vocab_size=8)
    (problem,) = verify(str(tmp_path / "data"), deep=True).problems
    assert problem == f"{tmp_path}/data.bin: token 9 at position 1 is outside the vocabulary of 8"
    write(tmp_path / "data")
    manifest = read_manifest(tmp_path / "data")
    assert manifest is not None
    write_manifest(tmp_path / "data", replace(manifest, contents=replace(manifest.contents, largest_token=8)))
    (problem,) = verify(str(tmp_path / "data"), deep=True).problems
    assert problem == f"{tmp_path}/data.bin: its largest token is 9, the manifest says 8"
    with IndexedDatasetWriter(tmp_path / "float", np.float32) as writer:
        writer.add_documents(np.array([-0.5], dtype=np.float32), np.array([1]))
    assert verify(str(tmp_path / "float"), deep=True).problems == ()


def test_tokens_outside_the_vocabulary_at_start(tmp_path: Path) -> None:
    write(tmp_path / "data")
    prefixes = [str(tmp_path / "of_another_program"), str(tmp_path / "data")]
    check_largest_token(prefixes, 10)
    with pytest.raises(DataError, match=r"data: its largest token is 9, .*outside the vocabulary of 9; the data is of"):
        check_largest_token(prefixes, 9)


def test_the_line_on_sets_without_manifest() -> None:
    assert without_manifest([]) is None
    line = without_manifest(list("abcde"))
    assert line is not None
    assert line.startswith("no manifest: a, b, c and 2 more; ")


def test_a_file_that_cannot_be_hashed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        hash_file(tmp_path)
