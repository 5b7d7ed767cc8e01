"""One rank's failure is every rank's failure."""

from collections.abc import Callable
from typing import Any, TypeVar

from megatron_aquila.errors import CheckpointError
from megatron_aquila.parallel.collectives import gather_objects
from megatron_aquila.parallel.context import Group

T = TypeVar("T")


def together(action: Callable[[], Any], group: Group) -> list[Any]:
    """Run ``action`` on every rank and return all results, by rank of the group. They must be JSON values.

    All-gather of the results, hence also a barrier. When ``action`` raised anywhere, every rank raises CheckpointError
    with all the reasons, so that none waits in a collective for one that has given up.
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    reason = None if failure is None else str(failure) or type(failure).__name__
    outcomes = gather_objects([result, reason], group)
    reasons: dict[str, list[int]] = {}
    for rank, (_, reason) in zip(group.ranks, outcomes, strict=True):
        if reason is not None:
            reasons.setdefault(reason, []).append(rank)
    if reasons:
        where = {
            text: f" (rank {', '.join(map(str, ranks))})" if group.size > 1 else "" for text, ranks in reasons.items()
        }
        lines = (f"{text}{ranks}" for text, ranks in where.items())
        shared = CheckpointError("\n".join(lines))
        shared.is_shared = True
        raise shared from failure
    return [result for result, _ in outcomes]


def agreed(action: Callable[[], T], group: Group) -> T:
    """This rank's result of ``action``, once no rank has failed; raises as ``together`` where one has."""
    kept: list[T] = []
    together(lambda: kept.append(action()), group)
    return kept[0]
