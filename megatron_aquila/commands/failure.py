"""How every command fails: a user's error as a message and status 2, never a traceback."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_aquila.config.cli import format_problems
from megatron_aquila.errors import LOST_RANK, AquilaError, CommunicationError, ConfigError, Stopped


@dataclass
class ExitCode:
    """The command's exit status; 0 unless the guarded block failed."""

    value: int = 0


@contextmanager
def exit_code(*, rank: int = 0) -> Iterator[ExitCode]:
    """Print a user's error to stderr and set the status; let our own mistakes through with their traceback.

    The status is 2, ``LOST_RANK`` where another rank is gone or late, 128 and the number of a signal that ended it.

    Of an error that every rank raises, rank 0 prints the one copy.
    """
    code = ExitCode()
    try:
        yield code
    except AquilaError as error:
        code.value = LOST_RANK if isinstance(error, CommunicationError) else 2
        if rank == 0 or not error.is_shared:
            text = format_problems(error) if isinstance(error, ConfigError) else f"error: {error}"
            print(text if rank == 0 else f"rank {rank}: {text}", file=sys.stderr)
    except Stopped as stop:
        code.value = 128 + stop.number
        if rank == 0:
            name = signal.Signals(stop.number).name
            print(f"stopped by {name} before the first step: there is nothing to save", file=sys.stderr)
    except KeyboardInterrupt:
        code.value = 130
        print("interrupted", file=sys.stderr)
