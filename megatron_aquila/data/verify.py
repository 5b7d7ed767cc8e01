"""Whether data sets are what their manifests say: sizes when a run starts, every byte on demand."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from megatron_aquila.data.indexed import IndexedDataset
from megatron_aquila.data.manifest import FileFacts, manifest_path, read_manifest
from megatron_aquila.data.progress import Report, counting, ignore
from megatron_aquila.data.provenance import named_provenance, provenance_facts
from megatron_aquila.errors import DataError

BLOCK: Final = 1 << 24  # bytes hashed, or tokens looked at, between two reports
NAMED: Final = 3  # data sets that a line names


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What ``verify`` found: a line on what is there, what is wrong, and what nothing can be said about."""

    prefix: str
    found: str
    problems: tuple[str, ...]
    unchecked: str | None


def verify(
    prefix: str, *, deep: bool = False, lines: bool = False, report: Callable[[int], None] = lambda _: None
) -> Verdict:
    """Open the data set, and hash its files where a manifest says what the hashes must be.

    Args:
        prefix: of the data set.
        deep: also look at every token: the largest is the manifest's, and all are in its tokenizer's vocabulary.
        lines: also hash the file that says where documents came from: tokens can be sound without it.
        report: called with the number of bytes, or tokens, looked at since the last call.
    """
    try:
        dataset = IndexedDataset(prefix)
    except DataError as error:
        return Verdict(prefix=prefix, found="not readable", problems=(str(error),), unchecked=None)
    problems = [] if dataset.manifest is None else _wrong_hashes(dataset, report)
    if lines:
        problems += _wrong_lines(dataset, report)
    if deep:
        problems += _wrong_tokens(dataset, report)
    found = (
        f"{len(dataset.document_indices) - 1:,} documents, {len(dataset):,} sequences, "
        f"{len(dataset.tokens):,} tokens of {dataset.dtype}"
    )
    unchecked = without_manifest([prefix]) or _without_lines(dataset)
    return Verdict(prefix=prefix, found=found, problems=tuple(problems), unchecked=unchecked)


def verify_all(prefixes: Sequence[str], report: Report = ignore) -> str:
    """``verify`` each data set that has a manifest; what was found, in a line.

    Raises:
        DataError: what is wrong, of every set; or a manifest cannot be read.
    """
    manifests = {prefix: manifest for prefix in prefixes if (manifest := read_manifest(prefix)) is not None}
    size = sum(file.size for known in manifests.values() for file in (known.contents.bin, known.contents.idx))
    hashed = counting(report, "bytes of data hashed", size)
    problems = [problem for prefix in manifests for problem in verify(prefix, report=hashed).problems]
    if problems:
        raise DataError("\n".join(problems))
    return f"hashed {size:,} bytes: {len(manifests)} of {len(prefixes)} data sets are what their manifests say"


def without_manifest(prefixes: Sequence[str]) -> str | None:
    """A line on what cannot be checked of data sets without a manifest; ``None`` where each has one."""
    bare = [prefix for prefix in prefixes if not manifest_path(prefix).exists()]
    if not bare:
        return None
    more = f" and {len(bare) - NAMED} more" if len(bare) > NAMED else ""
    return (
        f"no manifest: {', '.join(bare[:NAMED])}{more}; whether the bytes are those that were written, and by which "
        "tokenizer, cannot be checked"
    )


def check_largest_token(prefixes: Sequence[str], vocab_size: int) -> None:
    """Refuse a data set whose manifest names a token outside the vocabulary, before a run comes upon it.

    Raises:
        DataError: such a token, or a manifest that cannot be read.
    """
    for prefix in prefixes:
        manifest = read_manifest(prefix)
        largest = None if manifest is None else manifest.contents.largest_token
        if largest is not None and largest >= vocab_size:
            raise DataError(
                f"{prefix}: its largest token is {largest}, as {manifest_path(prefix)} says, outside the vocabulary of "
                f"{vocab_size}; the data is of another tokenizer, or --vocab-size is wrong"
            )


def hash_file(path: Path, report: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file, in hex. Raises ``DataError`` where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                report(len(block))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _wrong_hashes(dataset: IndexedDataset, report: Callable[[int], None]) -> list[str]:
    assert dataset.manifest is not None, f"{dataset.prefix}: no hashes to compare with"
    said = dataset.manifest.contents
    files = [(dataset.bin_path, said.bin), (dataset.idx_path, said.idx)]
    wrong = [_wrong_hash(path, facts, report) for path, facts in files]
    return [f"{what}; write the data set again" for what in wrong if what is not None]


def _wrong_lines(dataset: IndexedDataset, report: Callable[[int], None]) -> list[str]:
    """What is wrong with the file that says where documents came from, and that another data set may have replaced."""
    path, said = named_provenance(dataset), provenance_facts(dataset)
    if path is None or said is None:
        return []
    if (size := path.stat().st_size) != said.size:
        replaced = f"{path}: it has {size:,} bytes, the manifest says {said.size:,}: replaced by another data set's"
        return [f"{replaced}; remove it if that does not need it, the tokens here do not"]
    wrong = _wrong_hash(path, said, report)
    return [] if wrong is None else [f"{wrong}; remove it, the tokens do not need it"]


def _without_lines(dataset: IndexedDataset) -> str | None:
    """A line where the file is gone that should say where documents came from."""
    name = None if dataset.manifest is None else dataset.manifest.origin.options.get("provenance")
    if name is None or named_provenance(dataset) is not None:
        return None
    return f"{name} is gone: where documents came from is not known"


def _wrong_hash(path: Path, said: FileFacts, report: Callable[[int], None]) -> str | None:
    found = hash_file(path, report)
    if found == said.sha256:
        return None
    both = f"its SHA-256 is {found[:12]}..., the manifest says {said.sha256[:12]}..."
    return f"{path}: {both}: bytes were changed since it was written"


def _wrong_tokens(dataset: IndexedDataset, report: Callable[[int], None]) -> list[str]:
    """Every token of every sequence against the manifest; without one, only negative ones are wrong."""
    if dataset.dtype.kind == "f" or len(dataset.tokens) == 0:
        return []
    manifest = dataset.manifest
    tokenizer = None if manifest is None else manifest.origin.tokenizer
    vocab_size = np.iinfo(np.int64).max if tokenizer is None else tokenizer.vocab_size
    largest, problems = -1, []
    for start in range(0, len(dataset.tokens), BLOCK):
        tokens = dataset.tokens[start : start + BLOCK]
        wrong = (tokens < 0) | (tokens >= vocab_size)
        if np.any(wrong):
            first = int(np.argmax(wrong))
            place = f"token {tokens[first]} at position {start + first}"
            problems.append(f"{dataset.bin_path}: {place} is outside the vocabulary of {vocab_size}")
            break
        largest = max(largest, int(tokens.max()))
        report(len(tokens))
    if not problems and manifest is not None and largest != manifest.contents.largest_token:
        said = manifest.contents.largest_token
        problems.append(f"{dataset.bin_path}: its largest token is {largest}, the manifest says {said}")
    return problems
