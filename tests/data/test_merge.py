"""Merging is Megatron-LM's byte for byte, and what cannot be one data set is refused."""

import errno
import hashlib
import multiprocessing
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_aquila.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_aquila.data.manifest import FileFacts, Origin, SourceFile, TokenizerFacts, read_manifest
from megatron_aquila.data.merge import merge
from megatron_aquila.data.provenance import document_origin, join_provenance, provenance_line
from megatron_aquila.data.verify import verify
from megatron_aquila.errors import DataError


def write(prefix: Path, *tokens: int, dtype: type = np.uint16, modes: bool = False, fingerprint: str = "") -> str:
    with IndexedDatasetWriter(prefix, dtype, multimodal=modes) as writer:
        writer.add_sequence(tokens, mode=1 if modes else 0)
        writer.end_document()
        tokenizer = TokenizerFacts(kind="x", vocab_size=9, fingerprint=fingerprint) if fingerprint else None
        source = SourceFile(path=f"{prefix.name}.jsonl", size=1)
        writer.origin = replace(Origin.unknown(), tokenizer=tokenizer, sources=(source,))
    return str(prefix)


def test_megatrons_merge_byte_for_byte(megatron_fixtures: Path, tmp_path: Path) -> None:
    parts = [str(megatron_fixtures / name) for name in ("gpt_a", "gpt_c", "tool_u16")]
    copied: list[int] = []
    manifest = merge(parts, str(tmp_path / "out"), report=copied.append)
    for end in ("bin", "idx"):
        assert (tmp_path / f"out.{end}").read_bytes() == (megatron_fixtures / f"merged_u16.{end}").read_bytes()
    assert sum(copied) == manifest.contents.tokens
    assert manifest == read_manifest(tmp_path / "out")
    assert (manifest.origin.tokenizer, manifest.origin.options) == (None, {"merged": parts})
    assert verify(str(tmp_path / "out"), deep=True).problems == ()


@pytest.mark.parametrize("name", ["u8", "i16", "u16_multi", "i64", "i32_multimodal", "i32_zerolen", "i32_nodocs"])
def test_one_data_set_is_itself(megatron_fixtures: Path, tmp_path: Path, name: str) -> None:
    merge([str(megatron_fixtures / f"api_{name}")], str(tmp_path / "out"))
    for end in ("bin", "idx"):
        assert (tmp_path / f"out.{end}").read_bytes() == (megatron_fixtures / f"api_{name}.{end}").read_bytes()


def test_merging_is_associative(tmp_path: Path) -> None:
    a, b, c = (write(tmp_path / name, *tokens, modes=True) for name, tokens in (("a", [1, 2]), ("b", []), ("c", [3])))
    merge([a, b], str(tmp_path / "ab"))
    merge([b, c], str(tmp_path / "bc"))
    for name, parts in (("left", ["ab", "c"]), ("right", ["a", "bc"]), ("all", ["a", "b", "c"])):
        merge([str(tmp_path / part) for part in parts], str(tmp_path / name))
    for end in ("bin", "idx"):
        assert len({(tmp_path / f"{name}.{end}").read_bytes() for name in ("left", "right", "all")}) == 1
    dataset = IndexedDataset(tmp_path / "all")
    assert [dataset[i].tolist() for i in range(3)] == [[1, 2], [], [3]]
    assert dataset.modes is not None
    assert dataset.modes.tolist() == [1, 1, 1]


def test_where_it_came_from(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, 1, fingerprint="a" * 64) for name in "ab")
    origin = merge([a, b], str(tmp_path / "out")).origin
    assert origin.tokenizer == TokenizerFacts(kind="x", vocab_size=9, fingerprint="a" * 64)
    assert [source.path for source in origin.sources] == ["a.jsonl", "b.jsonl"]


def with_provenance(prefix: Path, *lines: int) -> str:
    """A data set of a document a line, and the file that says so."""
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in lines:
            writer.add_sequence([1])
            writer.end_document()
        meta = prefix.with_name(f"{prefix.name}.meta.jsonl")
        writer.origin = replace(Origin.unknown(), options={"provenance": meta.name})
    said = [provenance_line(n, source=f"{prefix.name}.jsonl", line=line, meta={}) for n, line in enumerate(lines)]
    meta.write_bytes(b"".join(said))
    return str(prefix)


def test_where_documents_came_from(tmp_path: Path) -> None:
    a, b, c = (with_provenance(tmp_path / name, *lines) for name, lines in (("a", [3, 5]), ("b", []), ("c", [9])))
    said: list[str] = []
    out = str(tmp_path / "out")
    merge([c, a, b, a], out, say=said.append)
    assert said == []
    merged = IndexedDataset(out)
    found = [document_origin(merged, document) for document in range(6)]
    assert found == ["c.jsonl:9", "a.jsonl:3", "a.jsonl:5", "a.jsonl:3", "a.jsonl:5", None]
    (tmp_path / "other.meta.jsonl").touch()
    with pytest.raises(DataError, match=r"other.meta.jsonl: it exists; give --overwrite"):
        merge([a], str(tmp_path / "other"))
    assert merged.manifest is not None
    lines = Path(f"{out}.meta.jsonl").read_bytes()
    facts = FileFacts(size=len(lines), sha256=hashlib.sha256(lines).hexdigest())
    assert merged.manifest.origin.provenance == facts
    merge([a], out, overwrite=True)
    assert document_origin(IndexedDataset(out), 1) == "a.jsonl:5"
    (tmp_path / "b.meta.jsonl").unlink()
    without = merge([a, b, write(tmp_path / "d", 1)], str(tmp_path / "some"), say=said.append)
    assert said == [f"where documents came from is not merged: {b}, {tmp_path / 'd'} does not say it"]
    assert "provenance" not in without.origin.options
    assert not (tmp_path / "some.meta.jsonl").exists()


def _stopped_merge(parts: list[str], out: str, overwrite: bool, moment: int, killed: bool) -> None:
    """Die by SIGKILL, or find the disk full, when the n-th name is given or taken; exit by 0 where there are fewer."""
    done = 0

    def stop(event: str, *_: object) -> None:
        nonlocal done
        done += event in ("os.rename", "os.remove")
        if event in ("os.rename", "os.remove") and done == moment:
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(stop)
    try:
        merge(parts, out, overwrite=overwrite)
    except DataError:
        os._exit(1)
    os._exit(0)


def origins(prefix: str) -> list[str | None]:
    dataset = IndexedDataset(prefix)
    return [document_origin(dataset, document) for document in range(len(dataset))]


@pytest.mark.parametrize("killed", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_stopped_at_any_name_no_manifest_vouches_for_another_sets_lines(
    tmp_path: Path, overwrite: bool, killed: bool
) -> None:
    a, c = with_provenance(tmp_path / "a", 3, 5), with_provenance(tmp_path / "c", 9)
    codes: list[int | None] = []
    kept = 0
    while 0 not in codes:
        out = str(tmp_path / f"out{len(codes)}")
        before = merge([a, c], out) if overwrite else None
        arguments = ([c, a], out, overwrite, len(codes) + 1, killed)
        process = multiprocessing.get_context("fork").Process(target=_stopped_merge, args=arguments)
        process.start()
        process.join()
        codes.append(process.exitcode)
        if process.exitcode != 0:
            found = read_manifest(out)
            assert found in (None, before)
            if found is not None:
                kept += 1
                assert verify(out, deep=True).problems == ()
                assert origins(out) == ["a.jsonl:3", "a.jsonl:5", "c.jsonl:9"]
            if not killed:
                assert not list(tmp_path.glob("*.tmp"))
                assert overwrite or not list(tmp_path.glob(f"{Path(out).name}.*"))
            merge([c, a], out, overwrite=overwrite or killed)
        assert verify(out, deep=True).problems == ()
        assert origins(out) == ["c.jsonl:9", "a.jsonl:3", "a.jsonl:5"]
    assert codes == [-signal.SIGKILL if killed else 1] * 6 + [0], "old manifest, old index, and four names"
    assert kept == int(overwrite)


def test_provenance_that_cannot_be_joined(tmp_path: Path) -> None:
    a = with_provenance(tmp_path / "a", 3, 5)
    meta, out = tmp_path / "a.meta.jsonl", str(tmp_path / "out")
    first, second = meta.read_bytes().splitlines(keepends=True)
    for data, message in (
        (first, "1 lines for the 2 documents of .*a; remove it to merge without"),
        (first + b"x\n", "a.meta.jsonl:2: no line of provenance"),
    ):
        meta.write_bytes(data)
        with pytest.raises(DataError, match=message):
            merge([a], out)
        assert not list(tmp_path.glob("out*"))
    meta.write_bytes(first + second)
    x = with_provenance(tmp_path / "x", 1)
    (tmp_path / "y.meta.jsonl").symlink_to(tmp_path / "x.meta.jsonl")
    with pytest.raises(DataError, match=r"x.meta.jsonl: it belongs to .*x, which is merged; write to another prefix"):
        merge([x], str(tmp_path / "y"), overwrite=True)
    broken = IndexedDataset(x)
    (tmp_path / "x.meta.jsonl").unlink()
    with pytest.raises(DataError, match=r"x: the file that says where its documents came from is not there"):
        join_provenance([broken], tmp_path / "z")
    with pytest.raises(DataError, match=r"nowhere"):
        join_provenance([], tmp_path / "nowhere" / "z")


def test_what_cannot_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, out = write(tmp_path / "a", 1, fingerprint="a" * 64), str(tmp_path / "out")
    refused = {
        "nothing to merge": [],
        "wide: dtype int32, but .*a has uint16": [a, write(tmp_path / "wide", 1, dtype=np.int32)],
        "modes: modes True, but .*a has False": [a, write(tmp_path / "modes", 1, modes=True)],
        "a and .*b were made by different tokenizers": [a, write(tmp_path / "b", 1, fingerprint="b" * 64)],
        "nowhere.idx: cannot be read": [a, str(tmp_path / "nowhere")],
    }
    for message, parts in refused.items():
        with pytest.raises(DataError, match=message):
            merge(parts, out)
    with pytest.raises(DataError, match=r"a: it is one of the data sets to merge"):
        merge([a], str(tmp_path / "." / "a"))
    merge([a], out)
    with pytest.raises(DataError, match=r"out.bin: it exists; give --overwrite"):
        merge([a, a], out)
    before = Path(f"{out}.bin").read_bytes()

    def fail(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge([a, a], out, overwrite=True, report=fail)
    assert Path(f"{out}.bin").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    merge([a, a], out, overwrite=True)
    assert len(IndexedDataset(out)) == 2


@pytest.mark.parametrize("end", ["bin", "idx"])
def test_damage_is_not_given_a_manifest_that_vouches_for_it(tmp_path: Path, end: str) -> None:
    a, b, out = write(tmp_path / "a", 1, 2, modes=True), write(tmp_path / "b", 3, 4, modes=True), str(tmp_path / "out")
    path = Path(f"{b}.{end}")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # a token, or a mode: both can be opened
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"b.{end}: its SHA-256 is .* bytes were changed since it was written"):
        merge([a, b], out)
    assert not list(tmp_path.glob("out*"))
    Path(f"{b}.manifest.json").unlink()
    merge([a, b], out)


def part(prefix: Path, index: int, count: int, corpus: str | None = "one") -> str:
    """A data set of one document that says it is a part of a corpus."""
    said = {} if corpus is None else {"corpus": corpus}
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_sequence([index])
        writer.end_document()
        writer.origin = replace(Origin.unknown(), options={"shard": [index, count], **said})
    return str(prefix)


def test_parts_are_all_of_one_corpus_in_their_order(tmp_path: Path) -> None:
    zero, one, two = (part(tmp_path / f"p{index}", index, 3) for index in range(3))
    other, of_two, old = (
        part(tmp_path / "o", 1, 3, "other"),
        part(tmp_path / "t", 1, 2),
        part(tmp_path / "a", 1, 3, None),
    )
    whole, out = write(tmp_path / "w", 7), str(tmp_path / "out")
    for parts, message in (
        ([zero, two], r"p0: its corpus has 3 parts, and 1/3 is missing; make it first, or give --partial if"),
        ([one], r"p1: its corpus has 3 parts, and 0/3, 2/3 is missing"),
        ([part(tmp_path / "many", 0, 9)], r"and 1/9, 2/9, 3/9 and 5 more is missing"),
        ([zero, two, one], r"p1: part 1/3 comes after .*p2, part 2; give each part once, in their order"),
        ([zero, one, one, two], r"p1: part 1/3 comes after .*p1, part 1; give each"),
        ([zero, other, two], r"o: part 1/3, but of another corpus, or made with other options, than .*p0, part 0/3"),
        ([old, zero, other, two], r"o: part 1/3, but of another corpus"),
        ([zero, of_two, one, two], r"t: part 1/2, but of another corpus"),
    ):
        with pytest.raises(DataError, match=message):
            merge(parts, out)
        assert not list(tmp_path.glob("out*"))
        with nullcontext() if "missing" in message else pytest.raises(DataError, match=message):
            merge(parts, str(tmp_path / "some"), partial=True, overwrite=True)
    for parts in ([zero, one, two], [zero, old, two]):
        merge([whole, *parts, whole], out, overwrite=True)
        assert IndexedDataset(out).tokens.tolist() == [7, 0, 1, 2, 7]
    merge([out, out], str(tmp_path / "twice"))
