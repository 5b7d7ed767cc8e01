"""The tokenizer that belongs to weights: the one that is named, else the checkpoint's own, else the one beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from megatron_aquila.checkpoint.megatron import TRACKER
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.data.tokenizer import Tokenizer, fingerprint, load_tokenizer, tokenizer_at
from megatron_aquila.errors import CheckpointError

FILES: Final = ("vocab_file", "merge_file", "special_tokens_file", "tokenizer_model")
GIVE: Final = "give --tokenizer-model, or --vocab-file, --merge-file and --special-tokens-file"


def open_tokenizer(
    reader: TensorReader, given: Mapping[str, Path | None], *, vocab_size: int, way_out: str = GIVE
) -> Tokenizer:
    """The tokenizer of the files ``given``, else the one that the checkpoint names, or that lies beside the weights.

    ``vocab_size``: tokens of the model. ``way_out``: what to do where no tokenizer is found.

    Raises:
        CheckpointError: none is found, its files are not there, it is another one than the run's, or it has more
            tokens than the model.
        DataError: they are no tokenizer.
    """
    folder = reader.folder
    saved: Any = reader.state.get("tokenizer") if isinstance(reader, CheckpointReader) else None
    tokenizer = _opened(reader, given, saved, way_out)
    expected = saved.get("fingerprint") if isinstance(saved, Mapping) else None
    if expected is not None and fingerprint(tokenizer) != expected:
        raise CheckpointError(
            f"{folder}: it is not the tokenizer that the run was trained with: the fingerprint is "
            f"{fingerprint(tokenizer)[:12]}, not {str(expected)[:12]}; {GIVE} as they were"
        )
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{folder}: the model has {vocab_size} tokens, the tokenizer {tokenizer.vocab_size}; name the tokenizer "
            "that the model was trained with"
        )
    return tokenizer


def _opened(reader: TensorReader, given: Mapping[str, Path | None], saved: Any, way_out: str) -> Tokenizer:
    if any(path is not None for path in given.values()):
        kind = _kind_of(given["tokenizer_model"])
    elif isinstance(saved, Mapping) and any(saved.get(name) is not None for name in FILES):
        kind = saved["tokenizer_type"]
        given = {name: None if saved.get(name) is None else Path(saved[name]) for name in FILES}
    elif (folder := tokenizer_beside(reader)) is not None:
        return tokenizer_at(folder)
    else:
        raise CheckpointError(f"{reader.folder}: it names no tokenizer, and none lies beside it; {way_out}")
    missing = [str(path) for path in given.values() if path is not None and not path.exists()]
    if missing:
        raise CheckpointError(f"{reader.folder}: its tokenizer's {', '.join(missing)} is not there; {GIVE}")
    return load_tokenizer(
        kind,
        vocab_file=given["vocab_file"],
        merge_file=given["merge_file"],
        special_tokens_file=given["special_tokens_file"],
        tokenizer_model=given["tokenizer_model"],
    )


def tokenizer_beside(reader: TensorReader) -> Path | None:
    """The folder of a tokenizer that lies beside the weights; of a checkpoint, ours or Megatron's, also beside its
    steps.
    """
    parent = reader.folder.resolve().parent
    holds_steps = isinstance(reader, CheckpointReader) or (parent / TRACKER).is_file()
    folders = [reader.folder, *([parent] if holds_steps else [])]
    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return next((folder for folder in folders if any((folder / name).is_file() for name in files)), None)


def _kind_of(model: Path | None) -> Any:
    """The kind of tokenizer that a file is of; without one, Aquila's three files."""
    if model is None:
        return "AquilaTokenizer"
    return "SentencePieceTokenizer" if model.suffix == ".model" else "HuggingFaceTokenizer"
