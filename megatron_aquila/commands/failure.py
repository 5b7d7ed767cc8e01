"""How every command fails: a user's error as a message and status 2, never a traceback."""

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from megatron_aquila.errors import (
    DRIFTED,
    LOST_RANK,
    AquilaError,
    CommunicationError,
    ConfigError,
    ReplicaError,
    Stopped,
    format_problems,
)

CLOSED: Final = 141  # what a shell says of a program that SIGPIPE ended


@dataclass
class ExitCode:
    """The command's exit status; 0 unless the guarded block failed."""

    value: int = 0


@contextmanager
def exit_code(*, rank: int = 0) -> Iterator[ExitCode]:
    """Print a user's error to stderr and set the status; let our own mistakes through with their traceback.

    The status is 2, ``LOST_RANK`` where another rank is gone or late, ``DRIFTED`` where replicas are not the same, 128
    and the number of a signal that ended it.

    Of an error that every rank raises, rank 0 prints the one copy. A reader of standard output that is gone, as of
    ``| head``, ends the command as it ends others, without a word.
    """
    code = ExitCode()
    try:
        yield code
        sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread():
            raise
        code.value = CLOSED
    except AquilaError as error:
        code.value = status_of(error)
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
    finally:
        _is_unread()


def status_of(error: AquilaError) -> int:
    """The exit status that tells a launcher what kind of error ended the process."""
    if isinstance(error, CommunicationError):
        return LOST_RANK
    return DRIFTED if isinstance(error, ReplicaError) else 2


def _is_unread() -> bool:
    """Whether the pipe of standard output has no reader; what is left for it is thrown away then.

    The interpreter would complain of it at its end.
    """
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # of a stream that is no file
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
    return True
