"""A timeline as text: one row a rank."""

import math
from collections.abc import Sequence

from megatron_aquila.pipeline.action import Action
from megatron_aquila.pipeline.simulate import Timeline

LEGEND = """a dot is waiting;
an action is its capital letter, its microbatch where there is room, and small letters to its end"""
_ROUNDING = 1 + 1e-9  # times are sums of floats


def draw(timeline: Timeline, width: int | None = None) -> str:
    """``timeline`` as text, e.g. ``rank 0 | F0 F1 .. B0 B0``. A column is the shortest action; ``.`` is idle time.

    An action that lasts several columns fills them all; ends are rounded to whole columns. Rows longer than ``width``
    characters go on in a further block, see ``num_blocks``.
    """
    names, unit, labels = _names(timeline), _unit(timeline), _labels(timeline)
    cell, columns = max(map(len, names.values())), round(timeline.makespan / unit)
    origin = timeline.origin
    rows = {}
    for rank, program in timeline.schedule.items():
        rows[rank] = ["." * cell] * columns
        for action in program:
            first, last = (round((t[action] - origin) / unit) for t in (timeline.start, timeline.end))
            rows[rank][first:last] = [names[action].ljust(cell)] * (last - first)
    each = columns if width is None else _columns_a_block(timeline, width)
    blocks = [
        "\n".join(f"{labels[rank]}{' '.join(row[at : at + each])}".rstrip() for rank, row in rows.items())
        for at in range(0, columns, each)
    ]
    return "\n\n".join(blocks)


def num_blocks(timeline: Timeline, width: int) -> int:
    """How many blocks ``draw`` needs."""
    return -(-round(timeline.makespan / _unit(timeline)) // _columns_a_block(timeline, width))


def draw_to_scale(timeline: Timeline, column: float) -> str:
    """``timeline`` as text at a scale, ``column`` of time a character, so that pictures of one scale can be compared.

    A row is as long as the whole timeline. ``LEGEND`` explains the characters. ``is_drawable`` must hold.
    """
    assert is_drawable(timeline, column), f"an action is shorter than {column}: it would not be seen"
    labels = _labels(timeline)
    return "\n".join(labels[rank] + "".join(_row(timeline, rank, column)) for rank in timeline.schedule)


def is_drawable(timeline: Timeline, column: float) -> bool:
    """Whether every action is at least a character wide at that scale."""
    return column <= _unit(timeline) * _ROUNDING


def _row(timeline: Timeline, rank: int, column: float) -> list[str]:
    """Every action, as wide as it lasts."""
    row, origin = ["."] * round(timeline.makespan / column), timeline.origin
    for action in timeline.schedule[rank]:
        first, last = (round((t[action] - origin) / column) for t in (timeline.start, timeline.end))
        name = f"{action.op}{action.microbatch}"
        row[first:last] = (name if len(name) <= last - first else action.op).ljust(last - first, action.op.lower())
    return row


def scale(timelines: Sequence[Timeline], width: int) -> float:
    """The ``column`` of ``draw_to_scale`` at which the longest of ``timelines`` fits into ``width`` characters.

    A whole fraction of the shortest action or a whole multiple of it, so that equal actions look equal.
    """
    room = max(1, width - max(len(_labels(timeline)[0]) for timeline in timelines))
    unit = min(map(_unit, timelines))
    units = max(timeline.makespan for timeline in timelines) / unit
    return unit / (room // units) if units <= room else unit * math.ceil(units / room)


def _columns_a_block(timeline: Timeline, width: int) -> int:
    cell = max(map(len, _names(timeline).values()))
    return max(1, (width - len(_labels(timeline)[0]) + 1) // (cell + 1))


def _labels(timeline: Timeline) -> dict[int, str]:
    """What stands before each rank's row, all of one width."""
    width = max(len(str(rank)) for rank in timeline.schedule)
    return {rank: f"rank {rank:<{width}} | " for rank in timeline.schedule}


def _names(timeline: Timeline) -> dict[Action, str]:
    """The actions' names, without the stage where a rank has only one."""
    chunked = timeline.num_stages > len(timeline.schedule)
    return {action: str(action) if chunked else f"{action.op}{action.microbatch}" for action in timeline.start}


def _unit(timeline: Timeline) -> float:
    return min(timeline.end[action] - timeline.start[action] for action in timeline.start)
