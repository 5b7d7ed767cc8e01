"""``aquila tokenizer train``: a byte-level BPE with Aquila's special tokens, from JSON lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.data.readers import read_texts
from megatron_aquila.data.tokenizer_training import measure_density, save_tokenizer_files, train_tokenizer


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a tokenizer; write vocab.json, merges.txt, special_tokens.txt, tokenizer.json and its settings."""

    input: tuple[Path, ...]
    """Files of one JSON object a line."""
    vocab_size: int
    """Ids of the tokenizer, special tokens included."""
    output: Path
    """Folder to write."""
    json_key: str = "text"
    """Key of the text."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = tyro.extras.subcommand_cli_from_dict(
        {"train": TrainOptions}, args=argv, prog="aquila tokenizer", description=__doc__
    )
    with exit_code() as code:
        run(options)
    return code.value


def run(options: TrainOptions) -> None:
    """Train, save, and print the mean tokens per document of each input, as Aquila's model card does."""
    texts = (text for path in options.input for text in read_texts(path, options.json_key))
    tokenizer = train_tokenizer(texts, options.vocab_size)
    save_tokenizer_files(tokenizer, options.output)
    print(f"{tokenizer.vocab_size:,} tokens, in {options.output}")
    print(f"{'file':<24}{'documents':>12}{'tokens/document':>17}{'bytes/token':>13}")
    for path in options.input:
        density = measure_density(tokenizer, read_texts(path, options.json_key))
        row = f"{density.documents:>12,}{density.mean_tokens:>17.1f}{density.bytes_per_token:>13.2f}"
        print(f"{path.name:<24}{row}")
