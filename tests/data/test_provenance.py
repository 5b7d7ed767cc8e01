"""A document's origin is found by its number, and shards put end to end say the same as one."""

import datetime
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aquila.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_aquila.data.manifest import FileFacts, Origin, read_manifest, write_manifest
from megatron_aquila.data.provenance import document_origin, find_provenance, provenance_line, renumbered
from megatron_aquila.data.verify import hash_file, verify
from megatron_aquila.errors import DataError


@given(numbers=st.sets(st.integers(0, 60)), widths=st.lists(st.integers(0, 90), min_size=61, max_size=61))
@settings(max_examples=30)
def test_every_document_is_found(
    tmp_path_factory: pytest.TempPathFactory, numbers: set[int], widths: list[int]
) -> None:
    path = tmp_path_factory.mktemp("meta") / "x.meta.jsonl"
    kept = sorted(numbers)
    lines = [provenance_line(n, source="a.jsonl", line=n + 1, meta={"w": "w" * widths[n]}) for n in kept]
    path.write_bytes(b"".join(lines))
    for number in range(62):
        found = find_provenance(path, number)
        assert (found is not None) == (number in numbers)
        if found is not None:
            width = "w" * widths[number]
            assert found == {"document": number, "source": "a.jsonl", "line": number + 1, "meta": {"w": width}}


def test_shards_end_to_end() -> None:
    """Numbers go on from the shards before, and are without a gap where documents were left out."""
    lines = [provenance_line(n, source="书,\n.json", line=n + 1, meta={"document": n}) for n in range(12)]
    assert list(renumbered(lines, 0)) == lines
    kept = list(map(json.loads, renumbered(lines[1::5], 10, 300)))
    assert [(each["document"], each["line"], each["meta"]["document"]) for each in kept] == [
        (10, 302, 1),
        (11, 307, 6),
        (12, 312, 11),
    ]
    assert {each["source"] for each in kept} == {"书,\n.json"}
    with pytest.raises(AssertionError, match="no line of provenance"):
        list(renumbered([b'{"text": 1}'], 0))


def test_values_that_json_does_not_know() -> None:
    meta = {"date": datetime.date(2024, 1, 2), "half": "\ud83d", "书": "书"}
    line = provenance_line(0, source="a", line=1, meta=meta)
    assert json.loads(line)["meta"] == {"date": "2024-01-02", "half": "\ud83d", "书": "书"}
    assert (
        provenance_line(0, source="书", line=1, meta=None)
        == '{"document": 0, "line": 1, "source": "书", "meta": {}}\n'.encode()
    )


@pytest.mark.parametrize("data", [b"oops\n", b"[1]\n", b'{"line": 1}\n', b'{"document": "1"}\n'])
def test_files_that_are_something_else(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.meta.jsonl"
    with pytest.raises(DataError, match="cannot be read: No such file"):
        find_provenance(path, 0)
    path.write_bytes(data)
    with pytest.raises(DataError, match="byte 0 begins no line of provenance"):
        find_provenance(path, 0)


def test_the_origin_of_a_document(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "out_text_document", np.uint16) as writer:
        writer.add_documents(np.arange(3), np.array([1, 2]))
    prefix, path = tmp_path / "out_text_document", tmp_path / "out.meta.jsonl"
    assert document_origin(IndexedDataset(prefix), 0) is None
    manifest = read_manifest(prefix)
    assert manifest is not None
    named = replace(manifest.origin, options={"provenance": path.name})
    write_manifest(prefix, replace(manifest, origin=named))
    dataset = IndexedDataset(prefix)
    assert document_origin(dataset, 0) is None, "the file is not there"
    path.write_bytes(provenance_line(1, source="a.jsonl", line=7, meta={"url": "u", "n": 3}))
    assert document_origin(dataset, 0) is None
    assert document_origin(dataset, 1) == "a.jsonl:7, url u, n 3"
    path.write_bytes(b"oops\n")
    with pytest.raises(DataError, match="begins no line of provenance"):
        document_origin(dataset, 1)


def test_lines_of_another_data_set_are_not_believed(tmp_path: Path) -> None:
    """Their file has the name that the manifest says, but neither the size nor the hash."""
    prefix, path = tmp_path / "out_text_document", tmp_path / "out.meta.jsonl"
    facts = []
    for line in (7, 8, 10):
        path.write_bytes(provenance_line(0, source="a.jsonl", line=line, meta={}))
        facts.append(FileFacts(size=path.stat().st_size, sha256=hash_file(path)))
    replaced = "replaced by another data set's"
    sizes = f"it has {facts[2].size} bytes, the manifest says {facts[1].size}: {replaced}; remove it if that does not"
    hashes = f"its SHA-256 is {facts[2].sha256[:12]}..., the manifest says {facts[0].sha256[:12]}..."
    changed = f"{hashes}: bytes were changed since it was written; remove it, the tokens do not need it"
    for said, origin, problem in (
        (facts[2], "a.jsonl:10", None),
        (facts[1], f"an unknown place: {path} was {replaced}", sizes),
        (replace(facts[0], size=facts[2].size), "a.jsonl:10", changed),
        (None, "a.jsonl:10", None),
    ):
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            writer.add_documents(np.arange(1), np.array([1]))
            writer.origin = replace(Origin.unknown(), options={"provenance": path.name}, provenance=said)
        assert document_origin(IndexedDataset(prefix), 0) == origin
        assert verify(str(prefix)).problems == (), "the tokens are sound"
        problems = verify(str(prefix), lines=True).problems
        assert len(problems) == (problem is not None)
        assert all(each.startswith(f"{path}: {problem}") for each in problems)
    path.unlink()
    assert document_origin(IndexedDataset(prefix), 0) is None
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_documents(np.arange(1), np.array([1]))
    assert verify(str(prefix), lines=True).unchecked is None, "there should be none"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_documents(np.arange(1), np.array([1]))
        writer.origin = replace(Origin.unknown(), options={"provenance": path.name}, provenance=facts[0])
    found = verify(str(prefix), lines=True)
    assert found.problems == ()
    assert found.unchecked == "out.meta.jsonl is gone: where documents came from is not known"
