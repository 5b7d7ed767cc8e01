"""What a transfer leaves behind: whoever records where each rank stands is told here, and nowhere else.

A ``Trail`` is handed to ``ParallelContext.create``, which gives every group its own ``GroupTrail``; ``tracked`` is the
one way in which a collective or a message is launched. ``observe.breadcrumbs`` has the trail that a run keeps.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from megatron_aquila.errors import CommunicationError

# What gloo and NCCL say where another rank is gone, stuck or late; anything else is a mistake and keeps its traceback.
LOST = ("timed out", "timeout", "connection closed", "connection reset", "connection refused", "broken pipe", "aborted")


class Waitable(Protocol):
    """What is left of a transfer that was launched: ``torch.distributed.Work``, or a stand-in."""

    def wait(self) -> object:
        """Return when it is done."""
        ...


class GroupTrail(Protocol):
    """Notes the transfers of one group on this rank."""

    def begin(self, op: str, x: Tensor, *, link: tuple[int, int] | None, waits: bool) -> int:
        """A transfer of ``x`` is launched; its ticket. ``link``: the global ranks it goes from and to, of two alone.

        ``waits``: the host waits for it from now on.
        """
        ...

    def waits(self, ticket: int) -> None:
        """The host waits for it from now on."""
        ...

    def ends(self, ticket: int) -> None:
        """It is done; on CUDA, the host has left it to the stream."""
        ...

    def lost(self, ticket: int) -> str:
        """In words, for an error: which transfer that is, and how to learn whose fault it was."""
        ...


class Trail(Protocol):
    """Notes what one rank does. ``waited`` is how many seconds its host has spent in transfers so far."""

    waited: float

    def at(self, step: int, phase: str) -> None:
        """The run has come to this phase ("start", "train", "validate", "save", "check", "end") of this step."""
        ...

    def group(self, name: str, ranks: tuple[int, ...]) -> GroupTrail:
        """The trail of a group of these global ranks."""
        ...


class Silent:
    """A trail, and a group's, that notes nothing."""

    waited = 0.0

    def at(self, step: int, phase: str) -> None:
        """Nothing is noted."""

    def group(self, name: str, ranks: tuple[int, ...]) -> GroupTrail:
        """Itself."""
        return self

    def begin(self, op: str, x: Tensor, *, link: tuple[int, int] | None, waits: bool) -> int:
        """Nothing is noted."""
        return 0

    def waits(self, ticket: int) -> None:
        """Nothing is noted."""

    def ends(self, ticket: int) -> None:
        """Nothing is noted."""

    def lost(self, ticket: int) -> str:
        """No more than that."""
        return "a transfer failed; with --save or --log-dir, `aquila doctor hang` names the rank"


SILENT = Silent()


class Tracked:
    """A transfer under way that notes when the host waits for it, and its end."""

    __slots__ = ("_ticket", "_trail", "_work")

    def __init__(self, work: Waitable, trail: GroupTrail, ticket: int) -> None:
        self._work, self._trail, self._ticket = work, trail, ticket

    def wait(self) -> None:
        """Wait for it; on CUDA the current stream does. Raises ``CommunicationError`` where another rank is lost."""
        self._trail.waits(self._ticket)
        try:
            self._work.wait()
        except RuntimeError as error:
            explain(error, self._trail, self._ticket)
            raise
        self._trail.ends(self._ticket)


def tracked(
    trail: GroupTrail,
    op: str,
    x: Tensor,
    launch: Callable[[], Waitable | None],
    *,
    link: tuple[int, int] | None = None,
    waits: bool = False,
) -> Tracked | None:
    """Launch a transfer of ``x`` and note it: what is left to wait for, or None where ``launch`` has waited.

    Communicates what ``launch`` does. ``link``: its global source and target, where it goes between two ranks of the
    group. Raises ``CommunicationError`` where another rank is gone or did not come before the timeout.
    """
    ticket = trail.begin(op, x, link=link, waits=waits)
    try:
        work = launch()
    except RuntimeError as error:
        explain(error, trail, ticket)
        raise
    if work is not None:
        return Tracked(work, trail, ticket)
    trail.ends(ticket)
    return None


def explain(error: RuntimeError, trail: GroupTrail, ticket: int) -> None:
    """Raise ``CommunicationError`` for an error about a lost rank; other errors are our own mistakes."""
    text = str(error)
    if any(words in text.lower() for words in LOST):
        raise CommunicationError(f"{trail.lost(ticket)} ({text.splitlines()[0]})") from error
