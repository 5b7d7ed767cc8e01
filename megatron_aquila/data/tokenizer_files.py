"""The files that a tokenizer is made of, read and checked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, cast

from megatron_aquila.data.fast_json import loads
from megatron_aquila.errors import DataError

SHOWN: Final = 80  # characters of a wrong file that a message repeats


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
    for number, line in enumerate(lines[first:], start=first + 1):
        if line.count(" ") != 1 or line[0] == " " or line[-1] == " ":
            raise DataError(f"{path}:{number}: not a merge of two tokens: {_shortened(line)!r}; take merges.txt")
    tokens = " ".join(lines[first:]).split(" ")
    return list(zip(tokens[::2], tokens[1::2], strict=False))  # of no line there is one empty token


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


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return [line for line in text.split("\n") if line != ""]


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
