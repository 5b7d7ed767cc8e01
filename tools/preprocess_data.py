"""Megatron-LM's name for ``aquila preprocess``: the same flags, the same files."""

import sys

from megatron_aquila.commands.preprocess import main

if __name__ == "__main__":
    sys.exit(main())
