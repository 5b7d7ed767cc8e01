"""What can be asked of ``aquila convert``, and what of it does not go together."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from megatron_aquila.errors import CheckpointError

if TYPE_CHECKING:
    from megatron_aquila.checkpoint.reader import TensorReader
    from megatron_aquila.plan.shape import ModelShape


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
    seq_len: int | None = None
    """samples' length in a written checkpoint; default what config.json says, or 2048"""
    tp: int = 1
    """tensor-parallel ranks of a written Megatron checkpoint"""
    pp: int = 1
    """its pipeline ranks"""
    chunks: int = 1
    """virtual stages of each pipeline rank"""
    megatron_names: Literal["classic", "core", "core-local"] = "classic"
    """what its tensors are called: as in FlagScale 0.x, or as in Megatron core, with Transformer Engine's layers or its
    own"""
    vocab_multiple: int = 128
    """its vocabulary is padded to a multiple of this times tp"""
    vocab_file: Path | None = None
    """vocab.json, with --merge-file and --special-tokens-file"""
    merge_file: Path | None = None
    """merges.txt"""
    special_tokens_file: Path | None = None
    """special_tokens.txt"""
    tokenizer_model: Path | None = None
    """tokenizer.json, or a SentencePiece model, instead of the three files"""
    norm_order: Literal["aquila", "llama"] | None = None
    """where RMSNorm casts, of weights that do not say; default llama"""
    drop_score_clamp: bool = False
    """leave the clamp of attention's scores out: the model is the same while no score reaches it"""
    tokenizer: bool = True
    """write a tokenizer beside published weights; one must be found"""
    resize_vocab: Path | None = None
    """this tokenizer, which extends the model's own, and rows for it: each new one is the mean of those of the pieces
    that the old tokenizer makes of the token"""
    verify: bool = True
    """compare fp32 logits with transformers' model where it knows the family; needs transformers"""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Print what a checkpoint holds: its tensors, their pieces, and the state."""

    checkpoint: tyro.conf.Positional[Path]
    """a checkpoint, or the folder whose `latest` names one"""


def contradicted(options: Convert, opened: "TensorReader", shape: "ModelShape") -> Iterator[str]:
    """Settings that stand in for what weights do not say, where these say other."""
    for name in ("vocab_size", "position_embedding", "seq_len", "norm_order"):
        given, found = getattr(options, name), getattr(shape, name)
        if given not in (None, found):
            yield f"{_flag(name)} {given}: {opened.folder} says {found}; leave it out"


def without_effect(options: Convert, opened: "TensorReader", form: str) -> Iterator[str]:
    """Settings of a form that is neither read nor written."""
    from megatron_aquila.generate.tokenizers import FILES

    for name in ("tp", "pp", "chunks", "megatron_names", "vocab_multiple"):
        given = getattr(options, name)
        if form != "megatron" and given != getattr(Convert, name):
            yield f"{_flag(name)} {given}: Megatron's files have it, and none are written; give --to-format megatron"
    if options.family is not None and form != "hf" and not is_published(options, opened):
        yield f"--family {options.family}: published files have one, which are neither read nor written; leave it out"
    for name in FILES if not opens_tokenizer(options, form) else ():
        if (given := getattr(options, name)) is not None:
            yield f"{_flag(name)} {given}: no tokenizer is opened, one beside the weights is copied; leave it out"


def is_published(options: Convert, opened: "TensorReader") -> bool:
    """Whether the weights that are read are neither a checkpoint of ours nor Megatron's."""
    from megatron_aquila.checkpoint.megatron import is_megatron
    from megatron_aquila.checkpoint.store import CheckpointReader

    return not isinstance(opened, CheckpointReader) and not is_megatron(options.source)


def opens_tokenizer(options: Convert, form: str) -> bool:
    """Whether a tokenizer is read, not only copied."""
    return options.resize_vocab is not None or (form == "hf" and options.tokenizer)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def shard_bytes(text: str) -> int:
    """``5GB`` or ``500MB`` in bytes. Raises CheckpointError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(MB|GB)", text.strip(), flags=re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise CheckpointError(f"--shard-size {text}: it is no size; give e.g. 5GB or 500MB")
    return int(float(found[1]) * (10**9 if found[2].upper() == "GB" else 10**6))
