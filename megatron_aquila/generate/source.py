"""What ``--load`` names: a checkpoint of ours or a Hugging Face folder, its model and its tokenizer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from megatron_aquila.checkpoint.huggingface import HuggingFaceReader
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.data.tokenizer import Tokenizer, fingerprint, load_tokenizer
from megatron_aquila.errors import CheckpointError
from megatron_aquila.plan.shape import ModelShape, padded_vocab_size

ROWS: Final = 128  # a rank's part of the vocabulary is a multiple of this
FILES: Final = ("vocab_file", "merge_file", "special_tokens_file", "tokenizer_model")
_GIVE: Final = "give --tokenizer-model, or --vocab-file, --merge-file and --special-tokens-file"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Weights on disk, the shape of their model, and what is said of its tokenizer."""

    reader: TensorReader
    shape: ModelShape

    @property
    def dtype(self) -> torch.dtype:
        """The type that the weights are stored in."""
        return self.reader.tensors["model.norm.weight"].dtype


def open_source(path: Path, *, tp: int) -> Source:
    """The model in ``path``; its vocabulary is padded to be split over ``tp``. Reads tables of contents only.

    Raises:
        CheckpointError: there is neither a checkpoint nor a folder with config.json and weights, or the model is none
            that is built here.
    """
    if (path / "config.json").is_file():
        return _published(path, tp)
    reader = CheckpointReader(path)
    return Source(reader=reader, shape=_padded(reader.shape(), tp))


def _published(path: Path, tp: int) -> Source:
    reader = HuggingFaceReader(path)
    fields: Mapping[str, Any] = reader.shape_fields()
    shape = ModelShape(
        **fields,
        padded_vocab_size=fields["vocab_size"],
        seq_len=reader.config.get("max_position_embeddings", 2048),
        norm_order="aquila" if reader.config.get("model_type") == "aquila" else "llama",
    )
    problems = reader.shape_problems(shape)
    if problems:
        raise CheckpointError(f"--load {path}: " + "; ".join(problems))
    return Source(reader=reader, shape=_padded(shape, tp))


def _padded(shape: ModelShape, tp: int) -> ModelShape:
    return replace(shape, padded_vocab_size=padded_vocab_size(shape.vocab_size, math.lcm(ROWS, tp)))


def open_tokenizer(source: Source, given: Mapping[str, Path | None]) -> Tokenizer:
    """The tokenizer of the files ``given``, else the one that the checkpoint names, or that lies in its folder.

    Raises:
        CheckpointError: neither names files that exist, they are not the tokenizer of the run, or it has more tokens
            than the model.
        DataError: they are no tokenizer.
    """
    folder, saved = source.reader.folder, None
    if all(path is None for path in given.values()):
        if isinstance(source.reader, CheckpointReader):
            saved = source.reader.state.get("tokenizer")
        given, kind = _named(source.reader, saved)
    else:
        kind = kind_of(given["tokenizer_model"])
    missing = [str(path) for path in given.values() if path is not None and not path.exists()]
    if missing:
        raise CheckpointError(f"{folder}: its tokenizer's {', '.join(missing)} is not there; {_GIVE}")
    tokenizer = load_tokenizer(
        kind,
        vocab_file=given["vocab_file"],
        merge_file=given["merge_file"],
        special_tokens_file=given["special_tokens_file"],
        tokenizer_model=given["tokenizer_model"],
    )
    expected = saved.get("fingerprint") if isinstance(saved, Mapping) else None
    if expected is not None and fingerprint(tokenizer) != expected:
        raise CheckpointError(
            f"{folder}: its tokenizer's files are not what they were: the fingerprint is "
            f"{fingerprint(tokenizer)[:12]}, not {str(expected)[:12]}; {_GIVE}"
        )
    if tokenizer.vocab_size > source.shape.vocab_size:
        raise CheckpointError(
            f"{folder}: the model has {source.shape.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}; {_GIVE}"
        )
    return tokenizer


def _named(reader: TensorReader, saved: object) -> tuple[Mapping[str, Path | None], Any]:
    """The tokenizer's files as the checkpoint says, or those beside the weights; and its kind."""
    if isinstance(saved, Mapping) and any(saved.get(name) is not None for name in FILES):
        files = {name: None if saved.get(name) is None else Path(saved[name]) for name in FILES}
        return files, saved["tokenizer_type"]
    folder = tokenizer_beside(reader)
    if folder is None:
        raise CheckpointError(f"{reader.folder}: it names no tokenizer; {_GIVE}")
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return dict.fromkeys(FILES) | {"tokenizer_model": folder / name}, kind_of(folder / name)
    names = {"vocab_file": "vocab.json", "merge_file": "merges.txt", "special_tokens_file": "special_tokens.txt"}
    return {"tokenizer_model": None} | {name: folder / file for name, file in names.items()}, kind_of(None)


def tokenizer_beside(reader: TensorReader) -> Path | None:
    """The folder of a tokenizer that lies beside the weights; of a checkpoint also beside its steps."""
    folders = [reader.folder, *([reader.folder.resolve().parent] if isinstance(reader, CheckpointReader) else [])]
    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return next((folder for folder in folders if any((folder / name).is_file() for name in files)), None)


def kind_of(model: Path | None) -> Any:
    """The kind of tokenizer that a file is of; without one, Aquila's three files."""
    if model is None:
        return "AquilaTokenizer"
    return "SentencePieceTokenizer" if model.suffix == ".model" else "HuggingFaceTokenizer"
