"""``aquila convert``: a checkpoint as a Hugging Face folder, or as a table on the terminal."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console
from rich.table import Table

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.errors import CheckpointError

if TYPE_CHECKING:
    from megatron_aquila.checkpoint.store import CheckpointReader
    from megatron_aquila.data.tokenizer import Tokenizer, TokenizerType

# Given the checkpoint, its tokenizer and the finished folder (still under a temporary name): a line on how well they
# agree. Raises AquilaError when they do not.
Verifier = Callable[["CheckpointReader", "Tokenizer", Path], str]
_TEXTS = ("这是一个测试", "Hello world", "[CLS]你好</s>", "### Human: 你好\n", "def f(x):\n\treturn x  # 1 + 1 = 2\n")

_GIVE_FILES = "give --tokenizer-model, or --vocab-file, --merge-file and --special-tokens-file"


@dataclass(frozen=True, kw_only=True)
class ToHf:
    """Write the weights and the tokenizer as a Hugging Face folder of the Llama form.

    The tokenizer is the one the run was trained with, unless its files are given.
    """

    checkpoint: Path
    """a checkpoint, or the folder whose `latest` names one"""
    output: Path
    """the new folder; it must not exist"""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """type of the exported weights; default as stored"""
    vocab_file: Path | None = None
    """vocab.json, with --merge-file and --special-tokens-file"""
    merge_file: Path | None = None
    """merges.txt"""
    special_tokens_file: Path | None = None
    """special_tokens.txt"""
    tokenizer_model: Path | None = None
    """tokenizer.json instead of the three files"""
    max_shard_gb: float = 5.0
    """largest size of one file, in 10^9 bytes"""
    verify: bool = True
    """reload the folder in transformers and compare it with ours before it gets its name; needs transformers"""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Print what a checkpoint holds: its tensors, their pieces, and the state."""

    checkpoint: tyro.conf.Positional[Path]
    """a checkpoint, or the folder whose `latest` names one"""


def main(argv: Sequence[str] | None = None) -> int:
    """Convert or inspect; returns the exit status."""
    commands: dict[str, Callable[..., ToHf | Inspect]] = {"to-hf": ToHf, "inspect": Inspect}
    options = tyro.extras.subcommand_cli_from_dict(commands, prog="aquila convert", args=argv)
    with exit_code() as code:
        if isinstance(options, ToHf):
            if options.verify:
                need_transformers()  # before gigabytes are written
            to_hf(options, compare_in_transformers)
        else:
            inspect(options.checkpoint, Console())
    return code.value


def to_hf(options: ToHf, verify: Verifier) -> None:
    """Export weights, config and tokenizer, verify the whole, and only then give the folder its name."""
    # Torch is imported here, so that --help and wrong flags answer at once.
    import torch

    from megatron_aquila.checkpoint.huggingface import export_huggingface
    from megatron_aquila.checkpoint.llama import SpecialIds
    from megatron_aquila.checkpoint.store import CheckpointReader
    from megatron_aquila.data.huggingface_tokenizer import save_huggingface_tokenizer

    reader = CheckpointReader(options.checkpoint)
    shape = reader.shape()
    tokenizer = open_tokenizer(options, reader.state)
    if tokenizer.vocab_size > shape.vocab_size:
        raise CheckpointError(
            f"{reader.folder}: the model has {shape.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}; "
            "name the tokenizer that the run was trained with"
        )
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

    def finish(folder: Path) -> None:
        save_huggingface_tokenizer(tokenizer, folder, max_length=shape.seq_len)
        print(verify(reader, tokenizer, folder) if options.verify else "not verified: --no-verify")

    export_huggingface(
        reader,
        options.output,
        shape=shape,
        dtype=reader.read("model.norm.weight").dtype if options.dtype is None else dtypes[options.dtype],
        ids=SpecialIds(bos=tokenizer.bos, eos=tokenizer.eod, pad=tokenizer.pad),
        max_shard_bytes=int(options.max_shard_gb * 10**9),
        finish=finish,
    )
    print(f"{reader.folder} -> {options.output}")


def need_transformers() -> None:
    """Raise CheckpointError where transformers is not installed."""
    if find_spec("transformers") is None:
        raise CheckpointError(
            "the folder cannot be verified: transformers is not installed; pip install 'megatron_aquila[hf]', or give "
            "--no-verify"
        )


def compare_in_transformers(reader: "CheckpointReader", tokenizer: "Tokenizer", folder: Path) -> str:
    """Load weights and tokenizer with transformers; ids must be equal and fp32 logits as near as rounding allows.

    A model or tokenizer of Aquila's size must also have Aquila's ids. Raises CheckpointError or DataError when they
    differ.
    """
    from megatron_aquila.data.huggingface_tokenizer import check_aquila_ids, check_huggingface_tokenizer
    from megatron_aquila.data.tokenizer import AQUILA_VOCAB_SIZE
    from megatron_aquila.verify.huggingface import compare_logits

    check_huggingface_tokenizer(tokenizer, folder, _TEXTS)
    if AQUILA_VOCAB_SIZE in (reader.shape().vocab_size, tokenizer.vocab_size):
        check_aquila_ids(folder)
    return f"token ids are equal, {compare_logits(reader, folder)}"


def open_tokenizer(options: ToHf, state: Mapping[str, object]) -> "Tokenizer":
    """The tokenizer whose files are given, else the one that the checkpoint names.

    Raises CheckpointError when neither names files that exist, or they are another tokenizer than the run's, DataError
    when they are no tokenizer.
    """
    from megatron_aquila.data.tokenizer import fingerprint, load_tokenizer

    names = ("vocab_file", "merge_file", "special_tokens_file", "tokenizer_model")
    given: Mapping[str, Path | None] = {name: getattr(options, name) for name in names}
    kind: TokenizerType = "AquilaTokenizer" if options.tokenizer_model is None else "HuggingFaceTokenizer"
    saved = state.get("tokenizer")
    if all(path is None for path in given.values()):
        if not isinstance(saved, Mapping) or all(saved[name] is None for name in names):
            raise CheckpointError(f"{options.checkpoint}: it names no tokenizer; {_GIVE_FILES}")
        kind = saved["tokenizer_type"]
        given = {name: None if saved[name] is None else Path(saved[name]) for name in names}
    missing = [str(path) for path in given.values() if path is not None and not path.exists()]
    if missing:
        raise CheckpointError(f"{options.checkpoint}: its tokenizer's {', '.join(missing)} is not there; {_GIVE_FILES}")
    tokenizer = load_tokenizer(
        kind,
        vocab_file=given["vocab_file"],
        merge_file=given["merge_file"],
        special_tokens_file=given["special_tokens_file"],
        tokenizer_model=given["tokenizer_model"],
    )
    expected = saved.get("fingerprint") if isinstance(saved, Mapping) else None
    if expected is not None and fingerprint(tokenizer) != expected:
        paths = ", ".join(str(path) for path in given.values() if path is not None)
        raise CheckpointError(
            f"{options.checkpoint}: {paths}: not the tokenizer that the run was trained with: the fingerprint is "
            f"{fingerprint(tokenizer)[:12]}, not {str(expected)[:12]}; {_GIVE_FILES} as they were"
        )
    return tokenizer


def inspect(path: Path, console: Console) -> None:
    """Print the table of contents. Reads only the manifest."""
    from megatron_aquila.checkpoint.store import CheckpointReader

    reader = CheckpointReader(path)
    table = Table("tensor", "shape", "type", "pieces", title=str(reader.folder), title_justify="left")
    for name, tensor in reader.tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        table.add_row(name, " x ".join(map(str, tensor.shape)), dtype, str(len(tensor.pieces)))
    console.print(table)
    count = sum(math.prod(stored.shape) for name, stored in reader.tensors.items() if "optimizer." not in name)
    manifest = reader.manifest
    console.print(f"step {reader.step}, saved {manifest.saved_text or 'at an unknown time'}: {count:,} parameters")
    console.print(f"{len(manifest.files)} files, {manifest.num_bytes:,} bytes with the optimizer")
    console.print(json.dumps(reader.state, indent=2, ensure_ascii=False), markup=False, highlight=False)
