"""A tokenizer as transformers' AutoTokenizer loads it, and the proof that it gives the same ids."""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_aquila.data.tokenizer import Tokenizer
from megatron_aquila.errors import DataError


def save_huggingface_tokenizer(tokenizer: Tokenizer, out_dir: Path, *, max_length: int | None = None) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json into an existing folder.

    The class is ``PreTrainedTokenizerFast``, which takes tokenizer.json as it is: through ``GPT2Tokenizer``, vocab.json
    and merges.txt alone give the special tokens other ids without a word. Nothing is added before or after a text.

    Args:
        tokenizer: what to save.
        out_dir: an existing folder.
        max_length: ``model_max_length``, the longest text the model was trained on.

    Raises:
        DataError: the folder cannot be written.
    """
    roles = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eod_token,
        "unk_token": tokenizer.pad_token,
        "pad_token": tokenizer.pad_token,
    }
    special = {role: token for role, token in roles.items() if token is not None}
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    config |= {"add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    if max_length is not None:
        config["model_max_length"] = max_length
    try:
        tokenizer.model.save(str(out_dir / "tokenizer.json"))
        for name, value in (("tokenizer_config", config), ("special_tokens_map", special)):
            text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
            (out_dir / f"{name}.json").write_text(text, encoding="utf-8")
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise DataError(f"{out_dir}: the tokenizer cannot be written: {error}") from error


def check_huggingface_tokenizer(tokenizer: Tokenizer, folder: Path, texts: Sequence[str]) -> None:
    """Load ``folder`` with transformers and compare: ids of every special token, of ``texts``, and the way back.

    Special tokens are recognised in a text there, so each text is encoded here as with ``allow_special_tokens``.

    Raises:
        DataError: transformers is not installed, cannot load the folder, or gives other ids.
    """
    try:
        from transformers import AutoTokenizer  # optional: only this check needs it
    except ImportError as error:
        raise DataError("transformers is not installed: pip install 'megatron_aquila[hf]'") from error
    try:
        theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever it trips over, the folder is not usable
        raise DataError(f"{folder}: transformers cannot load the tokenizer: {error}") from error
    model = tokenizer.model
    pairs: list[tuple[str, object, object]] = [
        ("bos_token_id", theirs.bos_token_id, tokenizer.bos),
        ("eos_token_id", theirs.eos_token_id, tokenizer.eod),
        ("pad_token_id", theirs.pad_token_id, tokenizer.pad),
    ]
    pairs += [
        (f"id of {token.content}", theirs.convert_tokens_to_ids(token.content), number)
        for number, token in model.get_added_tokens_decoder().items()
    ]
    model.encode_special_tokens = False
    for text in texts:
        ids = model.encode(text, add_special_tokens=False).ids
        pairs.append((f"ids of {text[:40]!r}", theirs(text)["input_ids"], ids))
        pairs.append((f"text of {ids[:8]}", theirs.decode(ids), tokenizer.decode(ids)))
    for what, found, expected in pairs:
        if found != expected:
            raise DataError(f"{folder}: through transformers the {what} is {found!r}, not {expected!r}")
