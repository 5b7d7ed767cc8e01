"""What several tokenizers make of the same texts, as the table of Aquila's model card."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_aquila.data.tokenizer import Tokenizer
from megatron_aquila.errors import DataError

BATCH = 256  # texts encoded at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What one tokenizer makes of one collection of texts.

    ``covered``: share of the characters that a token of the vocabulary writes alone; the others are written in bytes or
    not at all. ``exact``: share of the texts that decoding gives back as they were.
    """

    documents: int
    tokens: int
    num_bytes: int
    unknown: int
    covered: float
    exact: float

    @property
    def tokens_per_document(self) -> float:
        """Mean; 0 without documents."""
        return self.tokens / max(self.documents, 1)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes that one token stands for; 0 without tokens."""
        return self.num_bytes / max(self.tokens, 1)


def measure(tokenizer: Tokenizer, texts: Sequence[str]) -> Usage:
    """Encode every text, decode it again, and count."""
    tokens = unknown = exact = 0
    characters: Counter[str] = Counter()
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            tokens += len(ids)
            unknown += 0 if tokenizer.unknown is None else ids.count(tokenizer.unknown)
            exact += tokenizer.decode(ids) == text
            characters.update(text)
    return Usage(
        documents=len(texts),
        tokens=tokens,
        num_bytes=sum(len(text.encode("utf-8")) for text in texts),
        unknown=unknown,
        covered=_covered(tokenizer, characters),
        exact=exact / max(len(texts), 1),
    )


def _covered(tokenizer: Tokenizer, characters: Counter[str]) -> float:
    alone = tokenizer.encode_batch([*characters])
    whole = sum(
        count
        for (character, count), ids in zip(characters.items(), alone, strict=True)
        if any(tokenizer.token_bytes(number).strip(b" ") == character.encode().strip(b" ") for number in ids)
    )
    return whole / max(characters.total(), 1)


FIGURES: Mapping[str, str] = {
    "tokens/document": "{0.tokens_per_document:,.1f}",
    "bytes/token": "{0.bytes_per_token:.2f}",
    "coverage": "{0.covered:.2%}",
    "unknown": "{0.unknown:,}",
    "exact": "{0.exact:.1%}",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """``usage`` by tokenizer and by name of the texts; ``vocab_sizes`` by tokenizer."""

    vocab_sizes: Mapping[str, int]
    usage: Mapping[str, Mapping[str, Usage]]

    def rows(self) -> list[list[str]]:
        """The table: a head, then a row for each tokenizer; each figure for all texts in turn."""
        names = [*next(iter(self.usage.values()))]
        head = ["tokenizer", "vocabulary", *(f"{figure} {name}" for figure in FIGURES for name in names)]
        body = [
            [tokenizer, f"{self.vocab_sizes[tokenizer]:,}"]
            + [form.format(found[name]) for form in FIGURES.values() for name in names]
            for tokenizer, found in self.usage.items()
        ]
        return [head, *body]

    def text(self) -> str:
        """For the terminal: a block for each figure."""
        names = [*next(iter(self.usage.values()))]
        width = max(len(name) for name in ("tokenizer", *self.usage)) + 2
        column = max(14, *(len(name) + 2 for name in names))
        lines = []
        for figure, form in FIGURES.items():
            lines.append(f"{figure:<{width}}{'vocabulary':>12}" + "".join(f"{name:>{column}}" for name in names))
            lines += [
                f"  {tokenizer:<{width - 2}}{self.vocab_sizes[tokenizer]:>12,}"
                + "".join(f"{form.format(found[name]):>{column}}" for name in names)
                for tokenizer, found in self.usage.items()
            ]
        return "\n".join(lines)

    def markdown(self) -> str:
        """One table."""
        head, *body = self.rows()
        rule = ["---", *["---:"] * (len(head) - 1)]
        return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def compare(tokenizers: Mapping[str, Tokenizer], texts: Mapping[str, Iterable[str]]) -> Comparison:
    """Every tokenizer on every collection. Raises ``DataError`` where a collection is empty."""
    held = {name: list(of_name) for name, of_name in texts.items()}
    for name, of_name in held.items():
        if not of_name:
            raise DataError(f"{name}: it has no texts to compare tokenizers on")
    return Comparison(
        vocab_sizes={name: one.vocab_size for name, one in tokenizers.items()},
        usage={
            name: {texts_name: measure(one, of_name) for texts_name, of_name in held.items()}
            for name, one in tokenizers.items()
        },
    )


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Bars of the mean tokens a document, a group for each collection: the fewer, the better. PNG or SVG.

    The file appears whole or not at all.

    Raises:
        DataError: matplotlib is not installed, or the ending is neither .png nor .svg.
    """
    if path.suffix not in (".png", ".svg"):
        raise DataError(f"{path}: pictures are .png or .svg")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("a picture needs the matplotlib package: pip install 'megatron_aquila[plots]'") from error
    names = [*next(iter(comparison.usage.values()))]
    figure = Figure(figsize=(max(6.0, 3.2 * len(names)), 4.2), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    labels = [f"{name} ({comparison.vocab_sizes[name]:,})" for name in comparison.usage]
    colors = [f"C{number}" for number in range(len(labels))]
    for panel, name in zip(panels, names, strict=True):
        values = [found[name].tokens_per_document for found in comparison.usage.values()]
        bars = panel.bar(range(len(values)), values, color=colors, label=labels)
        panel.bar_label(bars, fmt="{:,.0f}", padding=2)
        panel.set_title(f"{name}: {next(iter(comparison.usage.values()))[name].documents:,} documents")
        panel.set_xticks([])
        panel.yaxis.set_major_formatter("{x:,.0f}")
        panel.margins(y=0.12)
        panel.spines[["top", "right"]].set_visible(False)
    handles, _ = panels[0].get_legend_handles_labels()
    columns = int(figure.get_figwidth() / (0.5 + 0.08 * max(map(len, labels))))  # inches of a mark, and of a letter
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), max(columns, 1), 4),
        title="tokenizer (vocabulary)",
    )
    panels[0].set_ylabel("mean tokens per document")
    beside = path.with_name(path.name + ".tmp")
    figure.savefig(beside, format=path.suffix[1:], dpi=120)
    os.replace(beside, path)
