"""Errors that a user can act on. ``assert`` is kept for our own mistakes."""

from collections.abc import Sequence
from dataclasses import dataclass

LOST_RANK = 3  # exit status where a transfer failed because of another rank
DRIFTED = 4  # exit status where replicas are no longer the same


class AquilaError(Exception):
    """Base of every error that is the input's fault; the command line prints it without a traceback.

    ``is_shared``: every rank of the run raises the same one, so that one of them prints it.
    """

    is_shared = False


class DataError(AquilaError):
    """A corpus, an index or a tokenizer cannot be used; the message names the file and the line or offset."""


class CheckpointError(AquilaError):
    """A checkpoint is missing, damaged or of another model; the message names the path."""


class ScheduleError(AquilaError):
    """A pipeline schedule is incomplete, out of order or can deadlock; the message shows where each rank stands."""


class RunFolderError(AquilaError):
    """A run's folder cannot be used: another run has it, or what it holds is no record of one; names the path."""


class CommunicationError(AquilaError, RuntimeError):
    """Another rank is gone, stuck or late; the message names the transfer in which this one noticed, and the way on.

    No fault of the input: the process leaves with status ``LOST_RANK``, and a launcher may start the run again.
    """


class ReplicaError(AquilaError):
    """Ranks that must hold the same values do not: a wrong reduction of gradients, or a machine that computes wrongly.

    The message names ranks and tensors, and where to go on from; every rank raises the same. Status ``DRIFTED``.
    """

    is_shared = True


class Stopped(BaseException):
    """A signal asked the process to leave before it had anything to save. No error: nothing may catch it on the way."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"signal {number}")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the settings: which flag, what value (empty for a bare one), why, what to do instead."""

    flag: str
    value: object
    why: str
    way_out: str

    def __str__(self) -> str:
        return f"{f'{self.flag} {self.value}'.rstrip()}: {self.why}; {self.way_out}"


class ConfigError(AquilaError):
    """The settings cannot run; carries every ``Problem`` found, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems, "ConfigError needs at least one problem"
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def refuse(problems: Sequence[Problem]) -> None:
    """Raise ConfigError where there are any, which every rank has found alike."""
    if problems:
        error = ConfigError(problems)
        error.is_shared = True
        raise error


def format_problems(error: ConfigError) -> str:
    """What every command prints when the settings cannot run: one line a problem."""
    count = len(error.problems)
    head = "1 setting cannot run" if count == 1 else f"{count} settings cannot run"
    return "\n".join([f"{head}:", *(f"  {problem}" for problem in error.problems)])
