"""How every command fails: a user's error as a message and status 2, never a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_aquila.config.cli import format_problems
from megatron_aquila.errors import AquilaError, ConfigError


@dataclass
class ExitCode:
    """The command's exit status; 0 unless the guarded block failed."""

    value: int = 0


@contextmanager
def exit_code(*, rank: int = 0) -> Iterator[ExitCode]:
    """Print a user's error to stderr and set the status; let our own mistakes through with their traceback.

    Problems of the settings are the same on every rank of a run: only rank 0 prints them.
    """
    code = ExitCode()
    try:
        yield code
    except ConfigError as error:
        code.value = 2
        if rank == 0:
            print(format_problems(error), file=sys.stderr)
    except AquilaError as error:
        code.value = 2
        print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code.value = 130
        print("interrupted", file=sys.stderr)
