"""The tokenizer that goes along with converted weights: found, written, and compared with what transformers reads."""

import os
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_aquila.checkpoint.folders import beside
from megatron_aquila.checkpoint.llama import SpecialIds
from megatron_aquila.checkpoint.published import CONFIG, SPECIAL_IDS
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.data.aquila_tokens import AQUILA_VOCAB_SIZE
from megatron_aquila.data.huggingface_tokenizer import (
    check_aquila_ids,
    check_huggingface_tokenizer,
    huggingface_settings,
    is_loadable,
    save_huggingface_tokenizer,
)
from megatron_aquila.data.tokenizer import Tokenizer, fingerprint, tokenizer_at
from megatron_aquila.data.tokenizer_files import read_json
from megatron_aquila.errors import AquilaError, DataError
from megatron_aquila.generate.tokenizers import GIVE, open_tokenizer, tokenizer_beside

_WAY_OUT = f"{GIVE}, or --no-tokenizer to write the weights alone"
_SETTINGS = "tokenizer_config.json"
_FILES = (
    "tokenizer*", "special_tokens*", "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "*.model",
)  # fmt: skip
_TEXTS = (
    "这是一个测试", "Hello world", "[CLS]你好</s>", "### Human: 你好\n", "def f(x):\n\treturn x  # 1 + 1 = 2\n",
    "", "  indented", "\n a ", "a<0x0A>",
)  # fmt: skip


def find_tokenizer(
    reader: TensorReader, given: Mapping[str, Path | None], *, vocab_size: int, is_needed: bool
) -> Tokenizer | None:
    """The tokenizer of a model with ``vocab_size`` tokens, as ``open_tokenizer``.

    Unless it ``is_needed``, None where none is there, or one that cannot be read here. Raises CheckpointError or
    DataError else.
    """
    try:
        return open_tokenizer(reader, given, vocab_size=vocab_size, way_out=_WAY_OUT)
    except AquilaError:
        if is_needed:
            raise
        return None


def put_tokenizer(tokenizer: Tokenizer | None, reader: TensorReader, folder: Path, *, max_length: int) -> None:
    """Beside weights that were written: a publisher's files as they are, where they are of ``tokenizer``, or it is not
    known; else what transformers reads, written anew. Raises DataError where it cannot be.
    """
    source = source_of(reader)
    if tokenizer is not None and not (is_published(tokenizer, source) and _is_of(tokenizer, source)):
        save_huggingface_tokenizer(tokenizer, folder, max_length=max_length)
        return
    for path in sorted({path for pattern in _FILES for path in source.glob(pattern) if path.is_file()}):
        _copy(path, folder / path.name)


def source_of(reader: TensorReader) -> Path:
    """The folder with the tokenizer's files of the weights that are read, where there are any."""
    folder = tokenizer_beside(reader)
    return reader.folder if folder is None else folder


def _copy(source: Path, path: Path) -> None:
    """Under a temporary name until it is whole; in place of what a killed run may have left."""
    temporary = beside(path, "tmp")
    try:
        shutil.copyfile(source, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: {source} cannot be copied there: {error.strerror}") from error


def special_ids(said: Mapping[str, Any], tokenizer: Tokenizer | None) -> SpecialIds:
    """Those that the weights came with; what they do not say is the tokenizer's."""
    own = (None,) * 3 if tokenizer is None else (tokenizer.bos, tokenizer.eod, tokenizer.pad)
    config = said.get(CONFIG, {})
    bos, eos, pad = (
        config[name] if config.get(name) is not None else number for name, number in zip(SPECIAL_IDS, own, strict=True)
    )
    return SpecialIds(bos=bos, eos=eos, pad=pad)


def is_published(tokenizer: Tokenizer, folder: Path) -> bool:
    """Whether the settings beside a tokenizer.json or tokenizer.model are not those that would be written here."""
    if not (folder / _SETTINGS).is_file():
        return False
    found = read_json(folder / _SETTINGS)
    found.pop("model_max_length", None)  # as long as the model's samples then were
    return found != huggingface_settings(tokenizer)


def _is_of(tokenizer: Tokenizer, folder: Path) -> bool:
    try:
        return fingerprint(tokenizer_at(folder)) == fingerprint(tokenizer)
    except DataError:
        return False


def compare_ids(tokenizer: Tokenizer, folder: Path, vocab_size: int, *, source: Path | None = None) -> str:
    """Hold transformers' ids of some texts against ours; a line on it, which says where a publisher's files differ.

    A model or tokenizer of Aquila's size must also have Aquila's ids. Raises DataError where files of ours differ, or
    transformers cannot load a publisher's in ``folder``, but can in ``source``, where they are from.
    """
    if is_published(tokenizer, folder):
        try:
            check_huggingface_tokenizer(tokenizer, folder, _TEXTS, is_published=True)
        except DataError as error:
            if source is not None and not is_loadable(folder) and is_loadable(source):
                raise
            return f"the tokenizer's files are the publisher's, and read otherwise here: {error}"
        return "token ids are equal, the tokenizer's files the publisher's"
    check_huggingface_tokenizer(tokenizer, folder, _TEXTS)
    if AQUILA_VOCAB_SIZE in (vocab_size, tokenizer.vocab_size):
        check_aquila_ids(folder)
    return "token ids are equal"


def ids_alone(tokenizer: Tokenizer, folder: Path, vocab_size: int, *, source: Path) -> str:
    """``compare_ids`` where logits are not compared, so that nobody asked for transformers. Raises DataError as it."""
    if find_spec("transformers") is None:
        return "token ids not compared: transformers is not installed"
    return compare_ids(tokenizer, folder, vocab_size, source=source)
