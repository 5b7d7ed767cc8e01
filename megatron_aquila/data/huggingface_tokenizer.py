"""A tokenizer as transformers' AutoTokenizer loads it, and the proof that it gives the same ids."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import processors

from megatron_aquila.data.aquila_tokens import AQUILA_GOLDEN_IDS, AQUILA_SPECIAL_TOKENS, AQUILA_VOCAB_SIZE
from megatron_aquila.data.sentencepiece_library import library_model
from megatron_aquila.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_aquila.data.tokenizer import Tokenizer, library_of
from megatron_aquila.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def save_huggingface_tokenizer(tokenizer: Tokenizer, out_dir: Path, *, max_length: int | None = None) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json into an existing folder; of a
    SentencePiece model also tokenizer.model.

    The class is ``PreTrainedTokenizerFast``, which takes tokenizer.json as it is: through ``GPT2Tokenizer``, vocab.json
    and merges.txt alone give the special tokens other ids without a word. Nothing is added before or after a text.

    Args:
        tokenizer: what to save.
        out_dir: an existing folder.
        max_length: ``model_max_length``, the longest text the model was trained on.

    Raises:
        DataError: the folder cannot be written, or tokenizer.json has no word for such a tokenizer.
    """
    try:
        if isinstance(tokenizer, SentencePieceTokenizer):
            (out_dir / "tokenizer.model").write_bytes(tokenizer.proto)
        for name, text in huggingface_files(tokenizer, max_length=max_length).items():
            (out_dir / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out_dir}: the tokenizer cannot be written: {error.strerror}") from error


def huggingface_files(tokenizer: Tokenizer, *, max_length: int | None = None) -> dict[str, str]:
    """Name and text of the files of text that ``save_huggingface_tokenizer`` writes."""
    config = huggingface_settings(tokenizer, max_length=max_length)
    special = {role: config[role] for role in _ROLES if role in config}
    named = {"tokenizer_config.json": config, "special_tokens_map.json": special}
    texts = {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in named.items()}
    return {"tokenizer.json": _model(tokenizer).to_str(pretty=True), **texts}


def huggingface_settings(tokenizer: Tokenizer, *, max_length: int | None = None) -> dict[str, object]:
    """The content of tokenizer_config.json."""
    tokens = (tokenizer.bos_token, tokenizer.eod_token, tokenizer.pad_token, tokenizer.pad_token)
    special = {role: token for role, token in zip(_ROLES, tokens, strict=True) if token is not None}
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    config |= {"add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    return config if max_length is None else {**config, "model_max_length": max_length}


def _model(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The library's object; of one whose file puts tokens around a text, another that puts none."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return library_model(tokenizer)
    model = library_of(tokenizer).model
    if model.num_special_tokens_to_add(is_pair=False) > 0:
        model = tokenizers.Tokenizer.from_str(model.to_str())
        model.post_processor = processors.Sequence([])
    return model


def check_huggingface_tokenizer(
    tokenizer: Tokenizer, folder: Path, texts: Sequence[str], *, is_published: bool = False
) -> None:
    """Load ``folder`` with transformers and compare: ids of every special token, of ``texts``, and the way back.

    Special tokens are recognised in a text there, so each text is encoded here as with ``allow_special_tokens``.

    Args:
        tokenizer: ours.
        folder: with what transformers reads.
        texts: what is encoded.
        is_published: the files are a publisher's, who says which token begins and ends a text, and whether one is put
            there; only ids and the way back are compared.

    Raises:
        DataError: transformers is not installed, cannot load the folder, or gives other ids.
    """
    theirs = _loaded(folder)
    pairs: list[tuple[str, object, object]] = []
    if not is_published:
        pairs += [
            ("bos_token_id", theirs.bos_token_id, tokenizer.bos),
            ("eos_token_id", theirs.eos_token_id, tokenizer.eod),
            ("pad_token_id", theirs.pad_token_id, tokenizer.pad),
        ]
    pairs += [
        (f"id of {token.content}", theirs.convert_tokens_to_ids(token.content), number)
        for number, token in _model(tokenizer).get_added_tokens_decoder().items()
    ]
    with_specials, bare = replace(tokenizer, allow_special_tokens=True), {"add_special_tokens": not is_published}
    for text in texts:
        ids = with_specials.encode(text)
        pairs.append((f"ids of {text[:40]!r}", theirs(text, **bare)["input_ids"], ids))
        if tokenizer.unknown not in ids:  # of which each library says something else
            pairs.append((f"text of {ids[:8]}", theirs.decode(ids), tokenizer.decode(ids)))
    for what, found, expected in pairs:
        if found != expected:
            raise DataError(f"{folder}: through transformers the {what} is {found!r}, not {expected!r}")


def check_aquila_ids(folder: Path) -> None:
    """Load ``folder`` with transformers: the special tokens and some texts must have the ids of Aquila's tokenizer.

    Raises:
        DataError: transformers is not installed, cannot load the folder, or gives other ids.
    """
    theirs = _loaded(folder)
    first = AQUILA_VOCAB_SIZE - len(AQUILA_SPECIAL_TOKENS)
    pairs: list[tuple[str, object, object]] = [
        (f"{token} has the id", theirs.convert_tokens_to_ids(token), number)
        for number, token in enumerate(AQUILA_SPECIAL_TOKENS, start=first)
    ]
    pairs += [
        (f"{text!r} has the ids", theirs(text)["input_ids"], list(ids)) for text, ids in AQUILA_GOLDEN_IDS.items()
    ]
    for what, found, expected in pairs:
        if found != expected:
            raise DataError(
                f"{folder}: a vocabulary of {AQUILA_VOCAB_SIZE} tokens is Aquila's, but through transformers {what} "
                f"{found}, not {expected}; name Aquila's own files, or give --no-verify if it is another tokenizer"
            )


def is_loadable(folder: Path) -> bool:
    """Whether transformers, where it is installed, makes a tokenizer of a folder."""
    try:
        _loaded(folder)
    except DataError:
        return False
    return True


def _loaded(folder: Path) -> "PreTrainedTokenizerBase":
    try:
        from transformers import AutoTokenizer  # optional: only these checks need it
    except ImportError as error:
        raise DataError("transformers is not installed: pip install 'megatron_aquila[hf]'") from error
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever it trips over, the folder is not usable
        raise DataError(f"{folder}: transformers cannot load the tokenizer: {error}") from error
