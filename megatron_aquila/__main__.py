"""``aquila COMMAND ...``, also ``python -m megatron_aquila COMMAND ...``."""

import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from megatron_aquila import __version__

COMMANDS = {
    "pretrain": "train a model; under torchrun one process a rank",
    "preprocess": "turn jsonl corpora into .bin/.idx token files",
    "data": "verify, inspect, merge, index and trace token files",
    "tokenizer": "train, compare and extend tokenizers",
    "convert": "turn weights of one form into another, or inspect a checkpoint",
    "ckpt": "list, verify, compare, tag and prune checkpoints",
    "generate": "continue texts, or chat, with a checkpoint or a Hugging Face folder",
    "evaluate": "perplexity and accuracy on token files, by source",
    "parity": "prove that a layout computes the same model as one process",
    "selftest": "prove that a run that was stopped and resumed is the run that never was",
    "doctor": "name the rank that a hanging run waits for",
    "schedule": "simulate and draw a pipeline schedule",
    "ledger": "what happened to a run, and whether no sample is in it twice or never",
    "config": "show the resolved settings and where each came from",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command with the rest of the arguments and return its exit status; 2 for an unknown command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"megatron_aquila {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"error: there is no command {name!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    # one module a command, imported only when called: most need no torch
    status: int = importlib.import_module(f"megatron_aquila.commands.{name}").main(rest)
    return status


def usage() -> str:
    """The commands, a line each."""
    lines = [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: aquila COMMAND [options]; COMMAND --help tells more; aquila --version", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
