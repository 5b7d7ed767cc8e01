"""Weights of one form into another; the same as ``aquila convert``."""

import sys

from megatron_aquila.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
