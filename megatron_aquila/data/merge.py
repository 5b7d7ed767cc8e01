"""Several data sets into one: index arithmetic and a copy of bytes; no token is looked at twice or decoded."""

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_aquila.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_aquila.data.manifest import Manifest, Origin, TokenizerFacts, package_versions
from megatron_aquila.data.verify import verify
from megatron_aquila.errors import DataError


def merge(
    prefixes: Sequence[str], output: str, *, overwrite: bool = False, report: Callable[[int], None] = lambda _: None
) -> Manifest:
    """Write the documents of ``prefixes``, in that order, as one data set; Megatron-LM's merge byte for byte.

    Inputs with manifests are verified first, or the output's would vouch for their damage. The output's files are
    hashed while they are written; its manifest names all sources, and the tokenizer where all say the same one.
    ``report`` is called with the tokens copied since the last call.

    Raises:
        DataError: no data set, one that is damaged, data sets of other dtypes, of other tokenizers, or some with modes
            only; the output is an input, or exists and ``overwrite`` is not set. Nothing is left of the output then.
    """
    if len(prefixes) == 0:
        raise DataError(f"{output}: nothing to merge; give the prefixes of .bin/.idx pairs")
    inputs = [IndexedDataset(prefix) for prefix in prefixes]
    _check(inputs, output, overwrite)
    for prefix in dict.fromkeys(prefixes):
        if problems := verify(prefix).problems:
            raise DataError("; ".join(problems))
    writer = IndexedDatasetWriter(output, inputs[0].dtype, multimodal=inputs[0].modes is not None)
    try:
        for dataset in inputs:
            writer.add_dataset(dataset, report)
        writer.origin = _origin(inputs)
        return writer.close()
    except BaseException:
        writer.discard()
        raise


def _check(inputs: Sequence[IndexedDataset], output: str, overwrite: bool) -> None:
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
    tokenizers = {said.fingerprint: dataset.prefix for dataset in inputs if (said := _tokenizer(dataset)) is not None}
    if len(tokenizers) > 1:
        one, other, *_ = tokenizers.values()
        raise DataError(f"{one} and {other} were made by different tokenizers: they cannot be one data set")
    existing = [path for end in ("bin", "idx") if (path := Path(f"{output}.{end}")).exists()]
    if existing and not overwrite:
        raise DataError(f"{existing[0]}: it exists; give --overwrite to replace it")


def _origin(inputs: Sequence[IndexedDataset]) -> Origin:
    known = [_tokenizer(dataset) for dataset in inputs]
    return Origin(
        tokenizer=None if None in known else known[0],
        sources=tuple(
            source for dataset in inputs if dataset.manifest is not None for source in dataset.manifest.origin.sources
        ),
        options={"merged": [dataset.prefix for dataset in inputs]},
        versions=package_versions("numpy"),
    )


def _tokenizer(dataset: IndexedDataset) -> TokenizerFacts | None:
    return None if dataset.manifest is None else dataset.manifest.origin.tokenizer
