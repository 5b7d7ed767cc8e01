"""Calls that were made and calls that were planned, in one form: (kind, ranks of the group) -> (how many, bytes)."""

from collections.abc import Iterable, Mapping

from megatron_aquila.plan.traffic import Traffic
from megatron_aquila.verify.dry import Call

Ranks = tuple[int, ...]
Tally = dict[tuple[str, Ranks], tuple[int, int]]


def counted(calls: Iterable[Call], *links: Ranks) -> Tally:
    """The groups ``links`` stand for both ends of their messages."""

    def ranks(call: Call) -> Ranks:
        if call.kind not in ("send", "receive"):
            return call.ranks
        return next(link for link in links if set(call.ranks) <= set(link))

    return _tally((call.kind, ranks(call), 1, call.num_bytes) for call in calls)


def as_planned(rows: Iterable[Traffic], groups: Mapping[str, Ranks]) -> Tally:
    """Groups of the same ranks are one."""
    return _tally((row.kind, groups[row.group], row.count, row.num_bytes) for row in rows)


def _tally(parts: Iterable[tuple[str, Ranks, int, int]]) -> Tally:
    tally: Tally = {}
    for kind, ranks, count, num_bytes in parts:
        before = tally.get((kind, ranks), (0, 0))
        tally[kind, ranks] = before[0] + count, before[1] + num_bytes
    return tally
