"""How every command fails: a user's error as a message and status 2, never a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_aquila.errors import AquilaError, ConfigError, format_problems


@dataclass
class ExitCode:
    """The command's exit status; 0 unless the guarded block failed."""

    value: int = 0


@contextmanager
def exit_code(*, rank: int = 0) -> Iterator[ExitCode]:
    """Print a user's error to stderr and set the status; let our own mistakes through with their traceback.

    Of an error that every rank raises, rank 0 prints the one copy.
    """
    code = ExitCode()
    try:
        yield code
    except AquilaError as error:
        code.value = 2
        if rank == 0 or not error.is_shared:
            text = format_problems(error) if isinstance(error, ConfigError) else f"error: {error}"
            print(text if rank == 0 else f"rank {rank}: {text}", file=sys.stderr)
    except KeyboardInterrupt:
        code.value = 130
        print("interrupted", file=sys.stderr)
