"""The files that a tokenizer is made of, read and checked; and the letters in which they write bytes."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Final, cast

from megatron_aquila.data.fast_json import loads
from megatron_aquila.errors import ConfigError, DataError, Problem

SHOWN: Final = 80  # characters of a wrong file that a message repeats


@cache
def byte_letters() -> tuple[str, ...]:
    """GPT-2's letter for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = {byte: 256 + place for place, byte in enumerate(byte for byte in range(256) if byte not in plain)}
    return tuple(chr(others.get(byte, byte)) for byte in range(256))


def needed_files(kind: str, flags: Mapping[str, Path | None]) -> list[Path]:
    """The files of ``flags``. Raises ``ConfigError`` where one is not given that this ``kind`` of tokenizer needs."""
    problems = [
        Problem(flag, "(not given)", f"--tokenizer-type {kind} needs it", "give the file, or another --tokenizer-type")
        for flag, path in flags.items()
        if path is None
    ]
    if problems:
        raise ConfigError(problems)
    return [path for path in flags.values() if path is not None]


def check_specials(path: Path, vocab: Mapping[str, int], vocab_path: Path, expected: Sequence[str]) -> None:
    """Raise ``DataError`` unless ``path`` lists ``expected``, none of it in ``vocab``.

    The ids of special tokens are their places in the file, so that another order is another tokenizer.
    """
    found = _lines(path)
    if found != list(expected):
        raise DataError(
            f"{path}: not Aquila's special tokens, one a line and in that order: expected "
            f"{' '.join(expected)}, found {_shortened(' '.join(found))}; take the file that came with "
            f"{vocab_path}, or a tokenizer.json with --tokenizer-type HuggingFaceTokenizer"
        )
    present = [token for token in found if token in vocab]
    if present:
        raise DataError(
            f"{vocab_path}: it holds {' '.join(present)}, which {path.name} puts after the vocabulary; take the files "
            "of one tokenizer"
        )


def read_vocab(path: Path, first: str) -> dict[str, int]:
    """vocab.json: ids from 0 without a gap, that of ``first`` 0. Raises ``DataError`` where it is not."""
    entries = read_json(path)
    ids = entries.values()
    if set(map(type, ids)) != {int} or set(ids) != set(range(len(entries))) or entries.get(first) != 0:
        raise DataError(f"{path}: not a vocabulary: ids must run from 0 without a gap, and {first} must have id 0")
    return cast(dict[str, int], entries)


def read_merges(path: Path) -> list[tuple[str, str]]:
    """merges.txt, in its order. Raises ``DataError`` where a line is no merge."""
    lines = _lines(path)
    first = 1 if lines and lines[0].startswith("#version") else 0
    merges = [tuple(line.split(" ")) for line in lines[first:]]
    for number, merge in enumerate(merges, start=first + 1):
        if len(merge) != 2 or "" in merge:
            raise DataError(
                f"{path}:{number}: not a merge of two tokens: {_shortened(' '.join(merge))!r}; take merges.txt"
            )
    return cast(list[tuple[str, str]], merges)


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises ``DataError`` where there is none."""
    try:
        value = loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object but a {type(value).__name__}")
    return value


def token_text(value: object) -> str | None:
    """A token of tokenizer_config.json, which writes it as a string or as an object; None where it is neither."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return [line for line in text.split("\n") if line != ""]


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
