"""``aquila convert``: weights of one form as another; ``aquila convert inspect``: a checkpoint as a table."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console
from rich.table import Table

from megatron_aquila.commands.convert_judge import Case, Judge, judge_in_transformers, need_transformers
from megatron_aquila.commands.convert_options import (
    Convert,
    Inspect,
    contradicted,
    is_published,
    opens_tokenizer,
    shard_bytes,
    without_effect,
)
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
        convert(asked, judge_in_transformers)
    return code.value


def convert(options: Convert, judge: Judge) -> None:
    """Convert, read every tensor back, compare logits and tokenizers, and only then give the folder its name."""
    # Torch is imported here, so that --help and wrong flags answer at once.
    from megatron_aquila.checkpoint import conversion

    model = model_of(options)
    job = job_of(options, model)
    if options.verify and job.unjudged is None:
        need_transformers()  # before gigabytes are written
    with conversion.alone(options.output):
        line = write(options, model, job, judge)
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


def write(options: Convert, model: Model, job: "Job", judge: Judge) -> str:
    """Write, compare and publish; a line on what was compared. Raises CheckpointError or DataError."""
    from megatron_aquila.checkpoint import conversion
    from megatron_aquila.checkpoint.folders import write_text
    from megatron_aquila.commands.convert_tokenizer import ids_alone, put_tokenizer, source_of
    from megatron_aquila.commands.model_card import model_card

    reader, shape, tokenizer = model.reader, model.shape, model.tokenizer if options.tokenizer else None
    inputs = inputs_of(model)
    folder = conversion.convert(
        reader, shape, job.target, options.output, dtype=job.dtype, inputs=inputs, workers=options.workers
    )
    if options.tokenizer:
        put_tokenizer(tokenizer, model.opened, folder, max_length=shape.seq_len)
    if not options.verify:
        line = "not verified: --no-verify"
    elif job.unjudged is None:
        line = judge(case_of(model, job, folder, tokenizer))
    else:
        line = f"logits not compared: in transformers' Llama {job.unjudged}"
        if tokenizer is not None and model.form == "hf":
            line = f"{ids_alone(tokenizer, folder, shape.vocab_size, source=source_of(model.opened))}; {line}"
    line += model.left_out
    if model.form == "hf":
        card = model_card(options.output.name, model.opened, shape, tokenizer, job.dtype, line)
        write_text(folder / "README.md", card)
    conversion.publish(folder, options.output, logits=line)
    return line


def case_of(model: Model, job: "Job", folder: Path, tokenizer: "Tokenizer | None") -> Case:
    """transformers runs with what is published, else with what was read; our model with the other side."""
    from megatron_aquila.commands.convert_tokenizer import source_of

    sides = [model.reader, job.target.reopen(folder)]
    ours, theirs = sides if model.form == "hf" else reversed(sides)
    return Case(
        ours=ours,
        theirs=theirs,
        shape=model.shape,
        dtype=job.dtype,
        tokenizer=tokenizer,
        published=folder if model.form == "hf" else None,
        source=source_of(model.opened),
    )


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

    if not opens_tokenizer(options, form):
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
    """What is to be written, and why transformers cannot judge it, or None."""

    target: "Target"
    dtype: "torch.dtype"
    unjudged: str | None


def job_of(options: Convert, model: Model) -> Job:
    """The target of the settings. Raises CheckpointError where it cannot hold the model."""
    import torch

    from megatron_aquila.checkpoint import conversion
    from megatron_aquila.checkpoint.families import FAMILIES, family_of_shape
    from megatron_aquila.checkpoint.megatron_form import MegatronForm
    from megatron_aquila.checkpoint.published import GENERATION, SAID, said_by
    from megatron_aquila.commands.convert_tokenizer import special_ids
    from megatron_aquila.plan.shape import padded_vocab_size
    from megatron_aquila.verify.huggingface import why_unjudged

    reader, shape, form = model.reader, model.shape, model.form
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype = reader.tensors["model.norm.weight"].dtype if options.dtype is None else dtypes[options.dtype]
    max_bytes, unjudged = shard_bytes(options.shard_size), why_unjudged(shape)
    if form == "megatron":
        rows = padded_vocab_size(shape.vocab_size, options.vocab_multiple * options.tp)
        cut = MegatronForm(
            tp=options.tp, pp=options.pp, chunks=options.chunks, padded_vocab_size=rows, names=options.megatron_names
        )
        return Job(target=conversion.megatron_target(reader, shape, cut, dtype=dtype), dtype=dtype, unjudged=unjudged)
    if form == "checkpoint":
        state: dict[str, Json] = {"converted_from": str(options.source), SAID: said_by(model.opened)}
        target = conversion.checkpoint_target(reader, shape, dtype=dtype, max_bytes=max_bytes, state=state)
        return Job(target=target, dtype=dtype, unjudged=unjudged)
    family = family_of_shape(shape) if options.family is None else FAMILIES[options.family]
    said = said_by(model.opened)
    ids = special_ids(said, model.tokenizer)
    target = conversion.huggingface_target(
        reader, shape, family, dtype=dtype, max_bytes=max_bytes, ids=ids, generation=said.get(GENERATION, {})
    )
    return Job(target=target, dtype=dtype, unjudged=unjudged)


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
