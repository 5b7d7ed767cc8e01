"""``PREFIX.manifest.json`` beside a data set: what its two files must be, and what made them.

Format 1, one JSON object::

    {"format": 1,
     "contents": {"documents": 3, "sequences": 3, "tokens": 12, "dtype": "uint16", "largest_token": 11,
                  "bin": {"size": 24, "sha256": "..."}, "idx": {"size": 98, "sha256": "..."}},
     "origin": {"tokenizer": {"kind": "AquilaTokenizer", "vocab_size": 100008, "fingerprint": "..."},
                "sources": [{"path": "zh.jsonl", "size": 1234}],
                "options": {"append_eod": true}, "versions": {"megatron_aquila": "...", "numpy": "..."},
                "provenance": {"size": 56, "sha256": "..."}}}

Sizes are in bytes, hashes are SHA-256 in hex, ``largest_token``, ``tokenizer`` and ``provenance`` may be null. It is
written last, under a temporary name first: where it stands, the files it speaks of are whole. Data sets of other
programs have none.
"""

import importlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, Self

import numpy as np
from annotated_types import Ge

from megatron_aquila import __version__
from megatron_aquila.data.temporary import temporary_path
from megatron_aquila.errors import DataError

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

FORMAT: Final = 1
WITHOUT: Final = "remove it to go without its checks"


@dataclass(frozen=True, slots=True)
class _Pattern:
    """Of a field's text, for pydantic: which only reading a manifest waits for, and no run that writes one."""

    regex: str

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> Any:
        from pydantic_core import core_schema

        return core_schema.str_schema(pattern=self.regex, strict=True)


Whole = Annotated[int, Ge(0)]
Hash = Annotated[str, _Pattern("^[0-9a-f]{64}$")]
DtypeName = Annotated[str, _Pattern("^(u?int8|u?int16|int32|int64|float32|float64)$")]


class _Exact:
    """No text for a number, no field that is not known."""

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True, "extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class FileFacts(_Exact):
    """What a file must be: ``size`` in bytes, ``sha256`` in hex."""

    size: Whole
    sha256: Hash


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerFacts(_Exact):
    """The tokenizer that made the tokens; ``fingerprint`` is ``data.tokenizer.fingerprint``."""

    kind: str
    vocab_size: Whole
    fingerprint: Hash


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile(_Exact):
    """A file that was read: its path as it was given and its bytes as they lay on disk, packed or not."""

    path: str
    size: Whole


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin(_Exact):
    """What made a data set, as its writer was told; ``options`` are plain JSON values.

    ``provenance`` is what the file that ``options`` name under that word must be: it may be shared by the data sets of
    several keys, and replaced without one of them. Manifests of earlier versions do not say it.
    """

    tokenizer: TokenizerFacts | None
    sources: tuple[SourceFile, ...]
    options: dict[str, Any]
    versions: dict[str, str]
    provenance: FileFacts | None = None

    @classmethod
    def unknown(cls) -> Self:
        """Nothing but the versions that run."""
        return cls(tokenizer=None, sources=(), options={}, versions=package_versions("numpy"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents(_Exact):
    """What a data set holds. ``largest_token`` is ``None`` where there is no token, or tokens are no integers."""

    documents: Whole
    sequences: Whole
    tokens: Whole
    dtype: DtypeName
    largest_token: int | None
    bin: FileFacts
    idx: FileFacts


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest(_Exact):
    """All that is known of a data set."""

    contents: Contents
    origin: Origin


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored(_Exact):
    format: Literal[1]
    contents: Contents
    origin: Origin


def manifest_path(prefix: str | os.PathLike[str]) -> Path:
    """``PREFIX.manifest.json``."""
    return Path(f"{os.fspath(prefix)}.manifest.json")


def package_versions(*packages: str) -> dict[str, str]:
    """Versions of this package, of Python and of ``packages``, by name."""
    found = {name: str(importlib.import_module(name).__version__) for name in packages}
    return {"megatron_aquila": __version__, "python": platform.python_version(), **found}


def write_manifest(prefix: str | os.PathLike[str], manifest: Manifest) -> None:
    """Put the manifest beside the data set, under a temporary name first.

    Raises:
        DataError: it cannot be written.
    """
    temporary, final = temporary_path(prefix, "manifest.json"), manifest_path(prefix)
    try:
        store_manifest(temporary, manifest)
        temporary.replace(final)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{final}: cannot be written: {error.strerror}") from error


def store_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest to ``path``, down to the disk.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1, ensure_ascii=False) + "\n"
    with path.open("wb") as file:
        file.write(text.encode("utf-8", errors="replace"))  # a path need not be UTF-8
        file.flush()
        os.fsync(file.fileno())


def remove_manifest(prefix: str | os.PathLike[str]) -> None:
    """Remove the manifest, where there is one, before its data set is replaced.

    Raises:
        DataError: it cannot be removed.
    """
    path = manifest_path(prefix)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be replaced: {error.strerror}") from error


def read_manifest(prefix: str | os.PathLike[str]) -> Manifest | None:
    """The manifest of a data set, every field of it checked; ``None`` where there is none.

    Raises:
        DataError: it cannot be read, or a field is missing, unknown, of another type or in conflict with another.
    """
    path = manifest_path(prefix)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; {WITHOUT}") from error
    from pydantic import ValidationError

    try:
        stored = _reader().validate_json(text)
    except ValidationError as error:
        raise DataError(f"{path}: {_in_words(error)}; {WITHOUT}") from error
    contents = stored.contents
    needed = contents.tokens * np.dtype(contents.dtype).itemsize
    if contents.bin.size != needed:
        why = f"{contents.bin.size}, but {contents.tokens} tokens of {contents.dtype} take {needed} bytes"
        raise DataError(f"{path}: contents.bin.size: {why}; {WITHOUT}")
    return Manifest(contents=contents, origin=stored.origin)


def manifest_of(said: Mapping[str, Any]) -> Manifest:
    """A manifest as ``asdict`` made it a mapping and JSON kept it."""
    stored = _reader().validate_json(json.dumps({"format": FORMAT, **said}))
    return Manifest(contents=stored.contents, origin=stored.origin)


@cache
def _reader() -> "TypeAdapter[_Stored]":
    from pydantic import TypeAdapter

    return TypeAdapter(_Stored)


def _in_words(error: "ValidationError") -> str:
    """The first thing wrong: the field and why; the text as a whole has no field."""
    first = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(map(str, first["loc"]))
    return f"{name}: {first['msg']}" if name else first["msg"]


def read_fingerprint(prefixes: Sequence[str]) -> str | None:
    """The tokenizer that made the data sets, where each of them says and all say the same; else ``None``.

    Raises:
        DataError: a manifest that cannot be read.
    """
    said = {None if known is None else known.fingerprint for known in map(_tokenizer, prefixes)}
    return said.pop() if len(said) == 1 else None


def check_fingerprint(prefixes: Sequence[str], fingerprint: str) -> None:
    """Refuse a data set that was made by a tokenizer of another ``fingerprint``, where it says by which.

    Raises:
        DataError: another tokenizer, or a manifest that cannot be read.
    """
    for prefix in prefixes:
        known = _tokenizer(prefix)
        if known is not None and known.fingerprint != fingerprint:
            raise DataError(
                f"{prefix}: it was tokenized by another tokenizer ({known.kind}, {known.vocab_size} tokens) with the "
                f"fingerprint {known.fingerprint[:12]}, not {fingerprint[:12]}, as {manifest_path(prefix)} says; "
                "name that tokenizer, or tokenize the text again"
            )


def _tokenizer(prefix: str) -> TokenizerFacts | None:
    manifest = read_manifest(prefix)
    return None if manifest is None else manifest.origin.tokenizer
