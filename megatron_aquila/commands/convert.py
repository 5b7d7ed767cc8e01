"""``aquila convert``: weights of one form as another; ``aquila convert inspect``: a checkpoint as a table."""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from megatron_aquila.checkpoint.conversion import Target
    from megatron_aquila.checkpoint.reader import TensorReader
    from megatron_aquila.data.tokenizer import Tokenizer, TokenizerType
    from megatron_aquila.plan.shape import ModelShape

# Given our weights, their tokenizer, the published folder (one that is written has a temporary name still) and the
# model's shape: a line on how well they agree. Raises AquilaError when they do not.
Verifier = Callable[["TensorReader", "Tokenizer | None", Path, "ModelShape"], str]
_TEXTS = ("这是一个测试", "Hello world", "[CLS]你好</s>", "### Human: 你好\n", "def f(x):\n\treturn x  # 1 + 1 = 2\n")

_GIVE_FILES = "give --tokenizer-model, or --vocab-file, --merge-file and --special-tokens-file"


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Weights of one form as another, file by file, proved tensor by tensor.

    What lies in the folder says which form it is: a checkpoint of ours, published weights of a known family, or
    Megatron's classic checkpoint. Ours become published weights, all others a checkpoint, unless --to-format says else.
    Killed, the same command goes on where it was. Tokenizer files go along with published weights: those the run was
    trained with, unless others are given, or those beside the weights.
    """

    source: Annotated[Path, tyro.conf.arg(name="from")]
    """the folder to read"""
    output: Annotated[Path, tyro.conf.arg(name="to")]
    """the new folder; it must not exist"""
    to_format: Literal["hf", "checkpoint", "megatron"] | None = None
    """form of the output; default hf from a checkpoint, and a checkpoint from all else"""
    family: Literal["llama", "baichuan2", "aquila"] | None = None
    """whose files published weights are like: of those read if their config.json does not say, of those written by
    default the first that can hold the model; llama makes a unit-length head plain"""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """type of the written weights; default as stored"""
    shard_size: str = "5GB"
    """largest size of one file, in MB or GB of 10^6 and 10^9 bytes"""
    workers: int = 1
    """files written at a time, each with a tensor in memory"""
    vocab_size: int | None = None
    """real tokens of a Megatron checkpoint that does not say"""
    position_embedding: Literal["rope", "rope-interleaved"] | None = None
    """order of rotary pairs in a written checkpoint; default that of the files read"""
    seq_len: int = 2048
    """samples' length in a written checkpoint, where the files read do not say"""
    tp: int = 1
    """tensor-parallel ranks of a written Megatron checkpoint"""
    pp: int = 1
    """its pipeline ranks"""
    vocab_multiple: int = 128
    """its vocabulary is padded to a multiple of this times tp"""
    vocab_file: Path | None = None
    """vocab.json, with --merge-file and --special-tokens-file"""
    merge_file: Path | None = None
    """merges.txt"""
    special_tokens_file: Path | None = None
    """special_tokens.txt"""
    tokenizer_model: Path | None = None
    """tokenizer.json instead of the three files"""
    verify: bool = True
    """compare fp32 logits with transformers' model where it knows the family; needs transformers"""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Print what a checkpoint holds: its tensors, their pieces, and the state."""

    checkpoint: tyro.conf.Positional[Path]
    """a checkpoint, or the folder whose `latest` names one"""


def main(argv: Sequence[str] | None = None) -> int:
    """Convert or inspect; returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["inspect"]:
        options = tyro.cli(Inspect, prog="aquila convert inspect", args=words[1:])
        with exit_code() as code:
            inspect(options.checkpoint, Console())
        return code.value
    asked = tyro.cli(Convert, prog="aquila convert", args=words)
    with exit_code() as code:
        convert(asked, compare_in_transformers)
    return code.value


def convert(options: Convert, verify: Verifier) -> None:
    """Convert, read every tensor back, compare logits and tokenizers, and only then give the folder its name."""
    # Torch is imported here, so that --help and wrong flags answer at once.
    from megatron_aquila.checkpoint import conversion
    from megatron_aquila.checkpoint.published import open_weights
    from megatron_aquila.checkpoint.store import CheckpointReader

    reader: TensorReader = open_weights(
        options.source,
        family=None if options.to_format == "hf" else options.family,
        vocab_size=options.vocab_size,
        position_embedding=options.position_embedding,
    )
    shape = shape_of(reader, options.seq_len)
    if options.workers < 1:
        raise CheckpointError(f"--workers {options.workers}: at least one thread writes; give 1 or more")
    form = options.to_format or ("hf" if isinstance(reader, CheckpointReader) else "checkpoint")
    if form == "hf" and options.family == "llama" and shape.norm_head:
        reader, shape = conversion.PlainHead(reader), replace(shape, norm_head=False, max_z_loss=0.0)
    job = job_of(options, form, reader, shape)
    if options.verify and job.judged is not None:
        need_transformers()  # before gigabytes are written
    folder = conversion.convert(reader, shape, job.target, options.output, dtype=job.dtype, workers=options.workers)
    if form == "hf" and job.tokenizer is None:
        copy_tokenizer(options.source, folder)
    elif job.tokenizer is not None:
        from megatron_aquila.data.huggingface_tokenizer import save_huggingface_tokenizer

        save_huggingface_tokenizer(job.tokenizer, folder, max_length=shape.seq_len)
    line = "not verified: --no-verify"
    if options.verify:
        line = f"logits not compared: {job.unjudged}"
        if job.judged is not None:
            ours = job.target.reopen(folder) if form == "checkpoint" else reader
            line = verify(ours, job.tokenizer, folder if job.judged == "written" else options.source, shape)
    conversion.publish(folder, options.output, logits=line)
    print(line)
    print(f"{reader.folder} -> {options.output}: every tensor was read back byte-equal")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be written, and which side transformers can judge: what was read, what is written, or neither."""

    target: "Target"
    dtype: "torch.dtype"
    tokenizer: "Tokenizer | None" = None
    judged: Literal["read", "written"] | None = None
    unjudged: str = "transformers does not know this form"


def job_of(options: Convert, form: str, reader: "TensorReader", shape: "ModelShape") -> Job:
    """The target of the settings. Raises CheckpointError where it cannot hold the model, or for another tokenizer."""
    import torch

    from megatron_aquila.checkpoint import conversion
    from megatron_aquila.checkpoint.families import FAMILIES, family_of_shape
    from megatron_aquila.checkpoint.huggingface import HuggingFaceReader
    from megatron_aquila.checkpoint.llama import SpecialIds
    from megatron_aquila.checkpoint.megatron import MegatronForm
    from megatron_aquila.checkpoint.store import CheckpointReader
    from megatron_aquila.plan.shape import padded_vocab_size

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype = reader.tensors["model.norm.weight"].dtype if options.dtype is None else dtypes[options.dtype]
    max_bytes = shard_bytes(options.shard_size)
    if form == "megatron":
        rows = padded_vocab_size(shape.vocab_size, options.vocab_multiple * options.tp)
        cut = MegatronForm(tp=options.tp, pp=options.pp, padded_vocab_size=rows)
        return Job(target=conversion.megatron_target(reader, shape, cut, dtype=dtype), dtype=dtype)
    if form == "checkpoint":
        state = {"converted_from": str(options.source)}
        target = conversion.checkpoint_target(reader, shape, dtype=dtype, max_bytes=max_bytes, state=state)
        return Job(target=target, dtype=dtype, judged="read" if isinstance(reader, HuggingFaceReader) else None)
    family = family_of_shape(shape) if options.family is None else FAMILIES[options.family]
    tokenizer = None
    if isinstance(reader, CheckpointReader):
        tokenizer = open_tokenizer(options, reader.state)
        if tokenizer.vocab_size > shape.vocab_size:
            raise CheckpointError(
                f"{reader.folder}: the model has {shape.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}; "
                "name the tokenizer that the run was trained with"
            )
    ids = SpecialIds(bos=None, eos=None, pad=None)
    if tokenizer is not None:
        ids = SpecialIds(bos=tokenizer.bos, eos=tokenizer.eod, pad=tokenizer.pad)
    target = conversion.huggingface_target(reader, shape, family, dtype=dtype, max_bytes=max_bytes, ids=ids)
    judged: Literal["written"] | None = "written" if family.name == "llama" else None
    return Job(target=target, dtype=dtype, tokenizer=tokenizer, judged=judged)


def shape_of(reader: "TensorReader", seq_len: int) -> "ModelShape":
    """The model's shape, with what published files do not say filled in."""
    from megatron_aquila.checkpoint.store import CheckpointReader
    from megatron_aquila.plan.shape import ModelShape, padded_vocab_size

    if isinstance(reader, CheckpointReader):
        return reader.shape()
    fields: dict[str, Any] = dict(reader.shape_fields())
    rows = padded_vocab_size(fields["vocab_size"], 128)
    return ModelShape(**{"padded_vocab_size": rows, "seq_len": seq_len} | fields)


def shard_bytes(text: str) -> int:
    """``5GB`` or ``500MB`` in bytes. Raises CheckpointError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(MB|GB)", text.strip(), flags=re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise CheckpointError(f"--shard-size {text}: it is no size; give e.g. 5GB or 500MB")
    return int(float(found[1]) * (10**9 if found[2].upper() == "GB" else 10**6))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Tokenizer files beside the weights that were read, to those written. Raises OSError."""
    for pattern in ("tokenizer*", "special_tokens*", "vocab.json", "merges.txt", "*.model"):
        for path in source.glob(pattern):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def need_transformers() -> None:
    """Raise CheckpointError where transformers is not installed."""
    if find_spec("transformers") is None:
        raise CheckpointError(
            "the folder cannot be verified: transformers is not installed; pip install 'megatron_aquila[hf]', or give "
            "--no-verify"
        )


def compare_in_transformers(
    reader: "TensorReader", tokenizer: "Tokenizer | None", folder: Path, shape: "ModelShape"
) -> str:
    """Load weights and tokenizer with transformers; ids must be equal and fp32 logits as near as rounding allows.

    A model or tokenizer of Aquila's size must also have Aquila's ids. Raises CheckpointError or DataError when they
    differ.
    """
    from megatron_aquila.data.huggingface_tokenizer import check_aquila_ids, check_huggingface_tokenizer
    from megatron_aquila.data.tokenizer import AQUILA_VOCAB_SIZE
    from megatron_aquila.verify.huggingface import compare_logits

    if tokenizer is None:
        return str(compare_logits(reader, folder, shape))
    check_huggingface_tokenizer(tokenizer, folder, _TEXTS)
    if AQUILA_VOCAB_SIZE in (shape.vocab_size, tokenizer.vocab_size):
        check_aquila_ids(folder)
    return f"token ids are equal, {compare_logits(reader, folder, shape)}"


def open_tokenizer(options: Convert, state: Mapping[str, object]) -> "Tokenizer":
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
            raise CheckpointError(f"{options.source}: it names no tokenizer; {_GIVE_FILES}")
        kind = saved["tokenizer_type"]
        given = {name: None if saved[name] is None else Path(saved[name]) for name in names}
    missing = [str(path) for path in given.values() if path is not None and not path.exists()]
    if missing:
        raise CheckpointError(f"{options.source}: its tokenizer's {', '.join(missing)} is not there; {_GIVE_FILES}")
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
            f"{options.source}: {paths}: not the tokenizer that the run was trained with: the fingerprint is "
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
