"""A manifest says what a data set must be; each of its fields is checked, and another tokenizer is refused."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aquila import __version__
from megatron_aquila.data.indexed import IndexedDatasetWriter
from megatron_aquila.data.manifest import (
    Manifest,
    Origin,
    SourceFile,
    check_fingerprint,
    manifest_path,
    package_versions,
    read_fingerprint,
    read_manifest,
    remove_manifest,
    write_manifest,
)
from megatron_aquila.data.tokenizer import Tokenizer, fingerprint, load_tokenizer, tokenizer_facts
from megatron_aquila.errors import DataError


@pytest.fixture
def tokenizer(tokenizer_files: dict[str, Path]) -> Tokenizer:
    return load_tokenizer("AquilaTokenizer", **tokenizer_files)  # type: ignore[arg-type]


def write(prefix: Path, tokenizer: Tokenizer | None = None) -> Manifest:
    """Three documents, the last of two sequences."""
    writer = IndexedDatasetWriter(prefix, np.uint16)
    writer.add_documents(np.array([5, 9, 2]), np.array([1, 2]))
    writer.add_sequence([7])
    writer.add_sequence([8, 1])
    writer.end_document()
    writer.origin = Origin(
        tokenizer=None if tokenizer is None else tokenizer_facts(tokenizer),
        sources=(SourceFile(path="in.jsonl", size=70),),
        options={"append_eod": False},
        versions=package_versions("numpy"),
    )
    return writer.close()


def test_what_it_says(tmp_path: Path, tokenizer: Tokenizer) -> None:
    written = write(tmp_path / "data", tokenizer)
    assert read_manifest(tmp_path / "data") == written
    said = json.loads((tmp_path / "data.manifest.json").read_text(encoding="utf-8"))
    files = {end: (tmp_path / f"data.{end}").read_bytes() for end in ("bin", "idx")}
    facts = {end: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for end, data in files.items()}
    assert said == {
        "format": 1,
        "contents": {
            "documents": 3,
            "sequences": 4,
            "tokens": 6,
            "dtype": "uint16",
            "largest_token": 9,
            **facts,
        },
        "origin": {
            "tokenizer": {"kind": "AquilaTokenizer", "vocab_size": 4104, "fingerprint": fingerprint(tokenizer)},
            "sources": [{"path": "in.jsonl", "size": 70}],
            "options": {"append_eod": False},
            "versions": said["origin"]["versions"],
            "provenance": None,
        },
    }


def test_of_earlier_versions_nothing_is_missing(tmp_path: Path) -> None:
    written, path = write(tmp_path / "data"), manifest_path(tmp_path / "data")
    said = json.loads(path.read_text())
    del said["origin"]["provenance"]
    path.write_text(json.dumps(said))
    assert read_manifest(tmp_path / "data") == written
    assert said["origin"]["versions"]["megatron_aquila"] == __version__
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx", "data.manifest.json"]


def test_nothing_known(tmp_path: Path) -> None:
    for dtype, tokens in ((np.uint8, []), (np.float32, [0.5])):
        with IndexedDatasetWriter(tmp_path / "data", dtype) as writer:
            writer.add_sequence(np.array(tokens, dtype=dtype))
            writer.end_document()
        manifest = read_manifest(tmp_path / "data")
        assert manifest is not None
        assert (manifest.contents.largest_token, manifest.origin.tokenizer) == (None, None)
    assert read_manifest(tmp_path / "of_another_program") is None


def test_a_path_need_not_be_unicode(tmp_path: Path) -> None:
    written = write(tmp_path / "data")
    source = SourceFile(path="\udcff.jsonl", size=1)
    origin = Origin(tokenizer=None, sources=(source,), options={}, versions={})
    write_manifest(tmp_path / "data", Manifest(contents=written.contents, origin=origin))
    said = read_manifest(tmp_path / "data")
    assert said is not None
    assert said.origin.sources[0].path == "?.jsonl"


def test_another_tokenizer_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "data", tokenizer)
    write(tmp_path / "unknown")
    prefixes = [str(tmp_path / name) for name in ("of_another_program", "unknown", "data")]
    check_fingerprint(prefixes, fingerprint(tokenizer))
    assert read_fingerprint(prefixes) is None
    assert read_fingerprint(prefixes[2:]) == fingerprint(tokenizer)
    with pytest.raises(
        DataError, match=r"data: it was tokenized by another tokenizer.*4104 tokens.*manifest.json says"
    ):
        check_fingerprint(prefixes, "0" * 64)


WRONG: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "format": (("format",), 2, "format: Input should be 1"),
    "unknown": (("more",), 1, "more: Unexpected keyword argument"),
    "count": (("contents", "documents"), -1, "contents.documents: .* greater than or equal to 0"),
    "text for a count": (("contents", "tokens"), "6", "contents.tokens: Input should be a valid integer"),
    "yes for a count": (("contents", "sequences"), True, "contents.sequences: Input should be a valid integer"),
    "dtype": (("contents", "dtype"), "bfloat16", "contents.dtype: String should match pattern"),
    "hash": (("contents", "idx", "sha256"), "0" * 63, "contents.idx.sha256: String should match pattern"),
    "size": (("contents", "bin", "size"), 13, "contents.bin.size: 13, but 6 tokens of uint16 take 12 bytes"),
    "largest": (("contents", "largest_token"), 1.5, "contents.largest_token: Input should be a valid integer"),
    "tokenizer": (("origin", "tokenizer"), {"kind": "x"}, "origin.tokenizer.vocab_size: Field required"),
    "sources": (("origin", "sources"), [{"path": 1, "size": 1}], "origin.sources.0.path: Input should be a valid str"),
    "versions": (("origin", "versions"), None, "origin.versions: Input should be an object"),
    "lines": (("origin", "provenance"), {"size": 1}, "origin.provenance.sha256: Field required"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_every_field_is_checked(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "data")
    path = manifest_path(tmp_path / "data")
    (*parents, name), value, message = WRONG[kind]
    body = json.loads(path.read_text())
    inner = body
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    path.write_text(json.dumps(body))
    with pytest.raises(DataError, match=rf"data.manifest.json: {message}.*; remove it to go without"):
        read_manifest(tmp_path / "data")
    if name not in ("more", "provenance"):
        del inner[name]
        path.write_text(json.dumps(body))
        with pytest.raises(DataError, match=rf"{name}: Field required"):
            read_manifest(tmp_path / "data")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=50)
@given(damage=st.binary(max_size=6), where=st.floats(0, 1), value=json_values, field=st.integers(0, 40))
def test_no_text_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, damage: bytes, where: float, value: object, field: int
) -> None:
    prefix = tmp_path_factory.mktemp("fuzz") / "data"
    write(prefix)
    path = manifest_path(prefix)
    whole = path.read_bytes()
    start = int(where * len(whole))
    bodies = [whole[:start] + damage + whole[start + len(damage) :], whole[:start], damage, json.dumps(value).encode()]
    body = json.loads(whole)
    places = [
        (inner, key) for inner in (body, body["contents"], body["contents"]["bin"], body["origin"]) for key in inner
    ]
    inner, key = places[field % len(places)]
    inner[key] = value
    for text in [*bodies, json.dumps(body).encode()]:
        path.write_bytes(text)
        with suppress(DataError):
            read_manifest(prefix)


def test_a_manifest_that_cannot_be_written(tmp_path: Path) -> None:
    written = write(tmp_path / "data")
    manifest_path(tmp_path / "data").unlink()
    manifest_path(tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=r"data.manifest.json: cannot be written: Is a directory"):
        write_manifest(tmp_path / "data", written)
    with pytest.raises(DataError, match=r"data.manifest.json: cannot be replaced: "):
        remove_manifest(tmp_path / "data")
    with pytest.raises(DataError, match=r"data.manifest.json: cannot be read: Is a directory; remove it"):
        check_fingerprint([str(tmp_path / "data")], "0" * 64)
    with pytest.raises(DataError, match=r"data.manifest.json: cannot be replaced: "):
        write(tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx", "data.manifest.json"]
