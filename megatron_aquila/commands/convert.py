"""``aquila convert``: weights of one form as another; ``aquila convert inspect``: a checkpoint as a table."""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from megatron_aquila.checkpoint import conversion
    from megatron_aquila.checkpoint.conversion import Target
    from megatron_aquila.checkpoint.manifest import Json
    from megatron_aquila.checkpoint.reader import TensorReader
    from megatron_aquila.data.tokenizer import Tokenizer
    from megatron_aquila.plan.shape import ModelShape

# Given our weights, their tokenizer, the published folder (one that is written has a temporary name still) and the
# model's shape: a line on how well they agree. Raises AquilaError when they do not.
Verifier = Callable[["TensorReader", "Tokenizer | None", Path, "ModelShape"], str]


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

    model = model_of(options)
    job = job_of(options, model)
    if options.verify and job.judged is not None:
        need_transformers()  # before gigabytes are written
    with conversion.alone(options.output):
        line = write(options, model, job, verify)
    print(line)
    print(f"{model.opened.folder} -> {options.output}: every tensor was read back byte-equal")


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is to be converted: the weights as ``opened``, and as they are to be read: with a plain head, or resized.

    ``tokenizer``: that of the written weights, where it had to be opened. ``left_out``: what is lost, in words.
    """

    form: str
    opened: "TensorReader"
    reader: "TensorReader"
    shape: "ModelShape"
    tokenizer: "Tokenizer | None"
    left_out: str = ""


def model_of(options: Convert) -> Model:
    """What the settings name. Raises CheckpointError or DataError where it cannot be opened or made so."""
    from megatron_aquila.checkpoint import conversion
    from megatron_aquila.checkpoint.published import model_shape, open_weights
    from megatron_aquila.checkpoint.store import CheckpointReader

    opened: TensorReader = open_weights(
        options.source,
        family=None if options.to_format == "hf" else options.family,
        vocab_size=options.vocab_size,
        position_embedding=options.position_embedding,
    )
    reader, shape = opened, model_shape(opened, seq_len=options.seq_len, norm_order=options.norm_order)
    form = options.to_format or ("hf" if isinstance(opened, CheckpointReader) else "checkpoint")
    problems = [*contradicted(options, opened, shape), *without_effect(options, opened, form)]
    if problems:
        raise CheckpointError("; ".join(problems))
    if options.workers < 1:
        raise CheckpointError(f"--workers {options.workers}: at least one thread writes; give 1 or more")
    tokenizer = tokenizer_of(options, form, opened, shape)
    if options.resize_vocab is not None:
        reader, shape, tokenizer = resized(opened, shape, tokenizer, options.resize_vocab)
    if form == "hf" and options.family == "llama" and shape.norm_head:
        reader, shape = conversion.PlainHead(reader), replace(shape, norm_head=False, max_z_loss=0.0)
    left_out = ""
    if options.drop_score_clamp and shape.score_clamp is not None:
        left_out = f"; the clamp of scores at {shape.score_clamp:g} was left out"
        shape = replace(shape, score_clamp=None)
    return Model(form=form, opened=opened, reader=reader, shape=shape, tokenizer=tokenizer, left_out=left_out)


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
    for name in FILES if not _opens_tokenizer(options, form) else ():
        if (given := getattr(options, name)) is not None:
            yield f"{_flag(name)} {given}: no tokenizer is opened, one beside the weights is copied; leave it out"


def is_published(options: Convert, opened: "TensorReader") -> bool:
    """Whether the weights that are read are neither a checkpoint of ours nor Megatron's."""
    from megatron_aquila.checkpoint.megatron import is_megatron
    from megatron_aquila.checkpoint.store import CheckpointReader

    return not isinstance(opened, CheckpointReader) and not is_megatron(options.source)


def _opens_tokenizer(options: Convert, form: str) -> bool:
    return options.resize_vocab is not None or (form == "hf" and options.tokenizer)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def write(options: Convert, model: Model, job: "Job", verify: Verifier) -> str:
    """Write, compare and publish; a line on what was compared. Raises CheckpointError or DataError."""
    from megatron_aquila.checkpoint import conversion
    from megatron_aquila.checkpoint.folders import write_text
    from megatron_aquila.commands.convert_tokenizer import ids_alone, put_tokenizer
    from megatron_aquila.commands.model_card import model_card

    reader, shape, tokenizer = model.reader, model.shape, model.tokenizer if options.tokenizer else None
    inputs = inputs_of(model)
    folder = conversion.convert(
        reader, shape, job.target, options.output, dtype=job.dtype, inputs=inputs, workers=options.workers
    )
    if options.tokenizer:
        put_tokenizer(tokenizer, model.opened, folder, max_length=shape.seq_len)
    line = "not verified: --no-verify"
    if options.verify:
        line = f"logits not compared: {job.unjudged}"
        if job.judged is not None:
            ours = job.target.reopen(folder) if model.form == "checkpoint" else reader
            line = verify(ours, tokenizer, folder if job.judged == "written" else options.source, shape)
        elif tokenizer is not None and model.form == "hf":
            line = f"{ids_alone(tokenizer, folder, shape.vocab_size)}; {line}"
    line += model.left_out
    if model.form == "hf":
        card = model_card(options.output.name, model.opened, shape, tokenizer, job.dtype, line)
        write_text(folder / "README.md", card)
    conversion.publish(folder, options.output, logits=line)
    return line


def inputs_of(model: Model) -> "conversion.Inputs":
    """What is read, so that a conversion that is taken up goes on with the same."""
    from megatron_aquila.checkpoint import conversion
    from megatron_aquila.data.tokenizer import fingerprint

    content = conversion.content_of(model.opened)
    return conversion.Inputs(content, None if model.tokenizer is None else fingerprint(model.tokenizer))


def tokenizer_of(options: Convert, form: str, reader: "TensorReader", shape: "ModelShape") -> "Tokenizer | None":
    """The tokenizer that is opened; None where files beside the weights are copied unread, or none is wanted.

    Raises CheckpointError where it has more tokens than the model, or none is found beside what is no published model.
    """
    from megatron_aquila.commands.convert_tokenizer import find_tokenizer
    from megatron_aquila.generate.tokenizers import FILES

    if not _opens_tokenizer(options, form):
        return None
    given = {name: getattr(options, name) for name in FILES}
    is_needed = options.resize_vocab is not None or not is_published(options, reader) or any(given.values())
    return find_tokenizer(reader, given, vocab_size=shape.vocab_size, is_needed=is_needed)


def resized(
    reader: "TensorReader", shape: "ModelShape", old: "Tokenizer | None", path: Path
) -> "tuple[TensorReader, ModelShape, Tokenizer]":
    """The model with the rows of the tokenizer at ``path``. Raises CheckpointError or DataError where it extends not
    ``old``, or ``old`` is not the model's.
    """
    from megatron_aquila.checkpoint.resize import ResizedReader
    from megatron_aquila.data.tokenizer import tokenizer_at
    from megatron_aquila.data.tokenizer_extension import old_pieces
    from megatron_aquila.plan.shape import padded_vocab_size

    assert old is not None, "the old tokenizer says what a new token consists of"
    if old.vocab_size != shape.vocab_size:
        raise CheckpointError(
            f"--resize-vocab {path}: the model has {shape.vocab_size} tokens, its tokenizer {old.vocab_size}; name the "
            "one that it was trained with"
        )
    new = tokenizer_at(path)
    rows = padded_vocab_size(new.vocab_size, 128)
    larger = replace(shape, vocab_size=new.vocab_size, padded_vocab_size=rows)
    return ResizedReader(reader, old_pieces(old, new)), larger, new


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be written, and which side transformers can judge: what was read, what is written, or neither."""

    target: "Target"
    dtype: "torch.dtype"
    judged: Literal["read", "written"] | None = None
    unjudged: str = "transformers judges safetensors of Llama's form alone"


def job_of(options: Convert, model: Model) -> Job:
    """The target of the settings. Raises CheckpointError where it cannot hold the model."""
    import torch

    from megatron_aquila.checkpoint import conversion
    from megatron_aquila.checkpoint.families import FAMILIES, family_of_shape
    from megatron_aquila.checkpoint.huggingface import HuggingFaceReader
    from megatron_aquila.checkpoint.megatron_form import MegatronForm
    from megatron_aquila.checkpoint.published import GENERATION, SAID, said_by
    from megatron_aquila.commands.convert_tokenizer import special_ids
    from megatron_aquila.plan.shape import padded_vocab_size

    reader, shape, form = model.reader, model.shape, model.form
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype = reader.tensors["model.norm.weight"].dtype if options.dtype is None else dtypes[options.dtype]
    max_bytes = shard_bytes(options.shard_size)
    if form == "megatron":
        rows = padded_vocab_size(shape.vocab_size, options.vocab_multiple * options.tp)
        cut = MegatronForm(
            tp=options.tp, pp=options.pp, chunks=options.chunks, padded_vocab_size=rows, names=options.megatron_names
        )
        return Job(target=conversion.megatron_target(reader, shape, cut, dtype=dtype), dtype=dtype)
    if form == "checkpoint":
        state: dict[str, Json] = {"converted_from": str(options.source), SAID: said_by(model.opened)}
        target = conversion.checkpoint_target(reader, shape, dtype=dtype, max_bytes=max_bytes, state=state)
        if options.resize_vocab is not None:
            return Job(target=target, dtype=dtype, unjudged="the vocabulary is no longer that of the files read")
        return Job(target=target, dtype=dtype, judged="read" if isinstance(model.opened, HuggingFaceReader) else None)
    family = family_of_shape(shape) if options.family is None else FAMILIES[options.family]
    said = said_by(model.opened)
    ids = special_ids(said, model.tokenizer)
    target = conversion.huggingface_target(
        reader, shape, family, dtype=dtype, max_bytes=max_bytes, ids=ids, generation=said.get(GENERATION, {})
    )
    judged: Literal["written"] | None = "written" if family.name == "llama" else None
    return Job(target=target, dtype=dtype, judged=judged)


def shard_bytes(text: str) -> int:
    """``5GB`` or ``500MB`` in bytes. Raises CheckpointError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(MB|GB)", text.strip(), flags=re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise CheckpointError(f"--shard-size {text}: it is no size; give e.g. 5GB or 500MB")
    return int(float(found[1]) * (10**9 if found[2].upper() == "GB" else 10**6))


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

    Raises CheckpointError or DataError when they differ.
    """
    from megatron_aquila.commands.convert_tokenizer import compare_ids
    from megatron_aquila.verify.huggingface import compare_logits

    found = str(compare_logits(reader, folder, shape))
    return found if tokenizer is None else f"{compare_ids(tokenizer, folder, shape.vocab_size)}, {found}"


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
