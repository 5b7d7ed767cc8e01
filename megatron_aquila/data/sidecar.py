"""``PREFIX.json`` beside a data set: which tokenizer made it, as text. Data sets of other programs have none."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_aquila.data.temporary import temporary_path
from megatron_aquila.data.tokenizer import Tokenizer, fingerprint
from megatron_aquila.errors import DataError


def sidecar_path(prefix: str | os.PathLike[str]) -> Path:
    """``PREFIX.json``."""
    return Path(f"{os.fspath(prefix)}.json")


def write_sidecar(prefix: str | os.PathLike[str], tokenizer: Tokenizer, *, documents: int, tokens: int) -> None:
    """Say which tokenizer made the data set, under a temporary name first.

    Raises:
        DataError: it cannot be written.
    """
    content = {
        "tokenizer_type": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": fingerprint(tokenizer),
        "documents": documents,
        "tokens": tokens,
    }
    temporary, final = temporary_path(prefix, "json"), sidecar_path(prefix)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(final)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{final}: cannot be written: {error.strerror}") from error


def remove_sidecar(prefix: str | os.PathLike[str]) -> None:
    """Remove what the data set of before said, if it said anything.

    Raises:
        DataError: it cannot be removed.
    """
    path = sidecar_path(prefix)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be replaced: {error.strerror}") from error


def check_fingerprint(prefixes: Sequence[str], fingerprint: str) -> None:
    """Refuse a data set that was made by a tokenizer of another ``fingerprint``; without a sidecar there is no check.

    Raises:
        DataError: another tokenizer, or a sidecar that cannot be read.
    """
    for prefix in prefixes:
        path = sidecar_path(prefix)
        if not path.exists():
            continue
        said = _read(path)
        if said["fingerprint"] != fingerprint:
            raise DataError(
                f"{prefix}: it was tokenized by another tokenizer ({said.get('tokenizer_type')}, "
                f"{said.get('vocab_size')} tokens) with the fingerprint {said['fingerprint'][:12]}, not "
                f"{fingerprint[:12]}, as {path} says; name that tokenizer, or tokenize the text again"
            )


def read_fingerprint(prefixes: Sequence[str]) -> str | None:
    """The tokenizer that made the data sets, where each of them says and all say the same; else ``None``.

    Raises:
        DataError: a sidecar that cannot be read.
    """
    paths = [sidecar_path(prefix) for prefix in prefixes]
    said = {_read(path)["fingerprint"] if path.exists() else None for path in paths}
    return said.pop() if len(said) == 1 else None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; remove it to go without the check") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}; remove it to go without the check") from error
    if not isinstance(value, dict) or not isinstance(value.get("fingerprint"), str):
        raise DataError(f"{path}: it names no fingerprint of a tokenizer; remove it to go without the check")
    return value
