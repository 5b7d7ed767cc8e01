"""README.md of published weights: what the model is, what its run says of its training, and what was checked."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_aquila import __version__
from megatron_aquila.checkpoint.llama import llama_tensors
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.data.blend import parse_blend
from megatron_aquila.data.tokenizer import Tokenizer, fingerprint
from megatron_aquila.observe.ledger import LEDGER_NAME, Event, read_ledger
from megatron_aquila.observe.writers import LOG_NAME, read_log
from megatron_aquila.plan.shape import ModelShape

Rows = Sequence[tuple[str, str]]


def model_card(
    name: str, reader: TensorReader, shape: ModelShape, tokenizer: Tokenizer | None, dtype: torch.dtype, checked: str
) -> str:
    """The card as Markdown. Only what files say is in it; ``checked`` is the line on logits and token ids.

    Raises DataError where the ledger beside a checkpoint, or its log, is damaged.
    """
    parts = [f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {name}\n"]
    parts.append(_table("Model", model_rows(shape, dtype)))
    if isinstance(reader, CheckpointReader):
        parts.append(_table("Training", [*training_rows(reader.step, reader.state), *_history(reader)]))
    if tokenizer is not None:
        parts.append(_table("Tokenizer", tokenizer_rows(tokenizer)))
    parts.append(
        f"## Checked\n\n- every tensor was read back and is byte-equal to what was converted (`certificate.json`)\n"
        f"- {checked}\n- `sha256sum -c SHA256SUMS` checks the files\n\nWritten by megatron_aquila {__version__}.\n"
    )
    return "\n".join(parts)


def model_rows(shape: ModelShape, dtype: torch.dtype) -> Rows:
    """Sizes of the network."""
    count = sum(torch.Size(size).numel() for size in llama_tensors(shape).values())
    return [
        ("parameters", f"{count:,}, in {str(dtype).removeprefix('torch.')}"),
        ("layers, hidden, feed-forward", f"{shape.num_layers}, {shape.hidden_size:,}, {shape.ffn_size:,}"),
        ("heads, of keys and values", f"{shape.num_heads}, {shape.num_kv_heads}"),
        ("tokens, context", f"{shape.vocab_size:,}, {shape.seq_len:,}"),
    ]


def training_rows(step: int, state: Mapping[str, Any]) -> Rows:
    """What the checkpoint itself says of its run."""
    found = []
    if isinstance(train := state.get("train"), Mapping):
        left_out = sum(stop - start for start, stop in train["skipped_samples"])
        found.append(("steps", f"{step:,}, of which {train['applied_steps']:,} updated the weights"))
        found.append(("samples", f"{train['consumed_samples']:,}, of which {left_out:,} were left out"))
        found.append(("tokens", f"{train['consumed_tokens']:,}"))
    if isinstance(data := state.get("data"), Mapping):
        for number, one in enumerate(data["sets"], start=1):
            share = "" if one["weight"] is None else f", weight {one['weight']:.4g}"
            found.append((f"data set {number}", f"{one['tokens']:,} tokens{share}, index {one['index_sha256'][:12]}"))
    found += [(name, str(state[name])) for name in ("precision", "optimizer") if name in state]
    if "converted_from" in state:
        found.append(("converted from", Path(str(state["converted_from"])).name))
    return found


def _history(reader: CheckpointReader) -> Iterator[tuple[str, str]]:
    """What the ledger beside the checkpoint says of the starts that led to it, and the log of the last one."""
    path = reader.folder.resolve().parent / LEDGER_NAME
    events = read_ledger(path) if path.is_file() else []
    starts = [event for event in events if event["event"] == "start" and event["step"] <= reader.step]
    if not starts:
        return
    config: Mapping[str, Any] = starts[-1]["config"]
    yield "run", f"{starts[-1]['run']}, {len(starts)} {'start' if len(starts) == 1 else 'starts'}"
    yield "began from", beginning(starts[0])
    if (part := config.get("optim.train_only")) is not None:
        yield "trained", f"{part} alone; all other weights are those it began from"
    yield "data sets", ", ".join(dict.fromkeys(name for start in starts for name in _names(start))) or "not named"
    yield from _settings(config)
    yield from _losses(config, path.parent, reader.step)
    yield "layouts", "; ".join(dict.fromkeys(_layout(start) for start in starts))
    yield "versions", ", ".join(dict.fromkeys(_version(start) for start in starts))


def beginning(start: Event) -> str:
    """What a run started with. Names alone: where folders lie is nobody's business."""
    published = start["config"].get("checkpoint.init_from_hf")
    if published is not None:
        return f"the published weights {Path(published).name}"
    found = start["checkpoint"]
    if found is not None:
        return f"{found['name']} of {Path(found['path']).parent.name}, with its optimizer"
    if start.get("weights") is None:
        return "weights drawn at random"
    weights = Path(start["weights"])
    return f"the weights of {weights.name}" + (f" of {weights.parent.name}" if weights.parent.name else "")


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Batch and learning rate of the last start, as far as an earlier version's ledger says them."""
    batch, length = config.get("train.global_batch"), config.get("model.seq_len")
    if batch is not None and length is not None:
        yield "batch", f"{batch:,} samples of {length:,} tokens"
    names = ("lr", "lr_decay", "min_lr", "lr_warmup_samples")
    rate, decay, least, warmup = (config.get(f"optim.{name}") for name in names)
    if None not in (rate, decay, least, warmup):
        yield "learning rate", f"{rate:g}, {decay} to {least:g}, after a warm-up of {warmup:,} samples"


def _losses(config: Mapping[str, Any], save: Path, step: int) -> Iterator[tuple[str, str]]:
    """The last losses up to ``step``, where the log still lies where that run wrote it."""
    said = config.get("observe.log_dir")
    path = (save if said is None else Path(said)) / LOG_NAME
    found: Sequence[Mapping[str, Any]] = read_log(path) if path.is_file() else []
    rows = [row for row in found if row["step"] <= step]
    for name, title in (("loss", "training loss"), ("valid_loss", "validation loss")):
        last = next((row for row in reversed(rows) if name in row), None)
        if last is not None:
            yield title, f"{last[name]:.4f} nats a token, at step {last['step']:,}"


def _names(start: Event) -> list[str]:
    """Names of the data sets, without the folders they lie in."""
    words = start["config"].get("data.path")
    return [Path(prefix).name for prefix in parse_blend(words)[0]] if words else []


def _layout(start: Event) -> str:
    return f"{start['world']} ranks: " + " ".join(f"{axis} {degree}" for axis, degree in start["layout"].items())


def _version(start: Event) -> str:
    return str(start["version"]) + ("" if start["commit"] is None else f" ({start['commit']})")


def tokenizer_rows(tokenizer: Tokenizer) -> Rows:
    """Kind, size and special ids, which generation_config.json has too."""
    ids = {"begin": tokenizer.bos, "end": tokenizer.eod, "padding": tokenizer.pad}
    return [
        ("kind", tokenizer.kind),
        ("tokens", f"{tokenizer.vocab_size:,}"),
        ("special ids", ", ".join(f"{name} {number}" for name, number in ids.items() if number is not None)),
        ("fingerprint", fingerprint(tokenizer)[:12]),
    ]


def _table(title: str, rows: Rows) -> str:
    return f"## {title}\n\n| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)
