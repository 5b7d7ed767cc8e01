"""Pretrain an Aquila model: ``torchrun --nproc-per-node 8 pretrain_aquila.py --config FILE --tp 4 --pp 2``."""

import sys

from megatron_aquila.commands.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
