"""Several data sets into one: index arithmetic and a copy of bytes; no token is looked at twice or decoded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from megatron_aquila.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_aquila.data.manifest import Manifest, Origin, TokenizerFacts, package_versions
from megatron_aquila.data.provenance import join_provenance, provenance_path
from megatron_aquila.data.shards import META
from megatron_aquila.data.verify import verify
from megatron_aquila.errors import DataError

NAMED: Final = 3  # missing parts that an error names


def merge(
    prefixes: Sequence[str],
    output: str,
    *,
    overwrite: bool = False,
    partial: bool = False,
    report: Callable[[int], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Write the documents of ``prefixes``, in that order, as one data set; Megatron-LM's merge byte for byte.

    Where all inputs say where their documents came from, ``OUTPUT.meta.jsonl`` says it of the output's; where only some
    do, it says nothing, and ``say`` gets a line with those that do not.

    Inputs with manifests are verified first, or the output's would vouch for their damage. The output's files are
    hashed while they are written; its manifest names all sources, and the tokenizer where all say the same one.
    ``partial`` says that parts of a corpus may be missing. ``report`` is called with the tokens copied since its last
    call.

    Raises:
        DataError: no data set, one that is damaged, data sets of other dtypes, of other tokenizers, or some with modes
            only; parts of a corpus (``aquila preprocess --shard``) that are not all of one corpus (or, with
            ``partial``, some), each once and in their order; the output is an input, or exists and ``overwrite`` is
            not set. Nothing is left of the output then.
    """
    if len(prefixes) == 0:
        raise DataError(f"{output}: nothing to merge; give the prefixes of .bin/.idx pairs")
    inputs = [IndexedDataset(prefix) for prefix in prefixes]
    origins = [provenance_path(dataset) for dataset in inputs]
    meta = Path(f"{output}.{META}") if None not in origins else None
    _check_parts(inputs, partial)
    _check(inputs, output, meta, overwrite)
    for prefix in dict.fromkeys(prefixes):
        if problems := verify(prefix).problems:
            raise DataError("; ".join(problems))
    writer = IndexedDatasetWriter(output, inputs[0].dtype, multimodal=inputs[0].modes is not None)
    try:
        for dataset in inputs:
            writer.add_dataset(dataset, report)
        lines = None if meta is None else join_provenance(inputs, writer.beside(META))
        writer.origin = replace(_origin(inputs, meta), provenance=lines)
        manifest = writer.close()
    except BaseException:
        writer.discard()
        raise
    silent = [dataset.prefix for dataset, path in zip(inputs, origins, strict=True) if path is None]
    if 0 < len(silent) < len(inputs):
        say(f"where documents came from is not merged: {', '.join(silent)} does not say it")
    return manifest


@dataclass(frozen=True, slots=True)
class _Part:
    """The ``index``-th of ``count`` parts of a corpus, whose digest is None in manifests that do not say it."""

    prefix: str
    index: int
    count: int
    corpus: str | None


def _check_parts(inputs: Sequence[IndexedDataset], partial: bool) -> None:
    """Parts of a corpus are all there unless ``partial``, once and in their order; others may lie around them."""
    parts = [part for part in map(_part, inputs) if part is not None]
    if not parts:
        return
    first = next((part for part in parts if part.corpus is not None), parts[0])
    for part in parts:
        if part.count != first.count or part.corpus not in (None, first.corpus):
            raise DataError(
                f"{part.prefix}: part {part.index}/{part.count}, but of another corpus, or made with other options, "
                f"than {first.prefix}, part {first.index}/{first.count}: documents would be missing or twice; make the "
                "parts of one corpus with the same inputs and options, and merge each corpus by itself"
            )
    there = {part.index for part in parts}
    missing = [f"{index}/{first.count}" for index in range(first.count) if index not in there]
    if missing and not partial:
        named = ", ".join(missing[:NAMED]) + (f" and {len(missing) - NAMED} more" if len(missing) > NAMED else "")
        raise DataError(
            f"{first.prefix}: its corpus has {first.count} parts, and {named} is missing; make it first, or give "
            "--partial if it is meant"
        )
    for before, part in pairwise(parts):
        if part.index <= before.index:
            raise DataError(
                f"{part.prefix}: part {part.index}/{part.count} comes after {before.prefix}, part {before.index}; give "
                "each part once, in their order"
            )


def _part(dataset: IndexedDataset) -> _Part | None:
    options = {} if dataset.manifest is None else dataset.manifest.origin.options
    match options.get("shard"):
        case [int(index), int(count)]:
            return _Part(dataset.prefix, index, count, options.get("corpus"))
    return None


def _check(inputs: Sequence[IndexedDataset], output: str, meta: Path | None, overwrite: bool) -> None:
    first = inputs[0]
    for dataset in inputs:
        if Path(dataset.prefix).resolve() == Path(output).resolve():
            raise DataError(f"{output}: it is one of the data sets to merge; write to another prefix")
        for what, ours, theirs in (
            ("dtype", dataset.dtype, first.dtype),
            ("modes", dataset.modes is not None, first.modes is not None),
        ):
            if ours != theirs:
                raise DataError(f"{dataset.prefix}: {what} {ours}, but {first.prefix} has {theirs}: they cannot be one")
    for dataset in inputs:
        path = provenance_path(dataset)
        if meta is not None and path is not None and path.resolve() == meta.resolve():
            raise DataError(f"{path}: it belongs to {dataset.prefix}, which is merged; write to another prefix")
    tokenizers = {said.fingerprint: dataset.prefix for dataset in inputs if (said := _tokenizer(dataset)) is not None}
    if len(tokenizers) > 1:
        one, other, *_ = tokenizers.values()
        raise DataError(f"{one} and {other} were made by different tokenizers: they cannot be one data set")
    written = [Path(f"{output}.bin"), Path(f"{output}.idx"), *([] if meta is None else [meta])]
    existing = [path for path in written if path.exists()]
    if existing and not overwrite:
        raise DataError(f"{existing[0]}: it exists; give --overwrite to replace it")


def _origin(inputs: Sequence[IndexedDataset], meta: Path | None) -> Origin:
    known = [_tokenizer(dataset) for dataset in inputs]
    options: dict[str, Any] = {"merged": [dataset.prefix for dataset in inputs]}
    return Origin(
        tokenizer=None if None in known else known[0],
        sources=tuple(
            source for dataset in inputs if dataset.manifest is not None for source in dataset.manifest.origin.sources
        ),
        options=options if meta is None else options | {"provenance": meta.name},
        versions=package_versions("numpy"),
    )


def _tokenizer(dataset: IndexedDataset) -> TokenizerFacts | None:
    return None if dataset.manifest is None else dataset.manifest.origin.tokenizer
