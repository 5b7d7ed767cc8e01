"""A timeline as text: one row a rank, one column a unit of time."""

from megatron_aquila.pipeline.simulate import Timeline


def draw(timeline: Timeline) -> str:
    """``timeline`` as text, e.g. ``rank 0 | F0 F1 .. B0 B0``. A column is the shortest action; ``.`` is idle time.

    An action that lasts several columns fills them all; ends are rounded to whole columns.
    """
    unit = min(timeline.end[action] - timeline.start[action] for action in timeline.start)
    origin = min(timeline.start.values())
    num_stages = 1 + max(action.stage for action in timeline.start)
    chunked = num_stages > len(timeline.schedule)
    names = {a: str(a) if chunked else f"{a.op}{a.microbatch}" for a in timeline.start}
    width = max(len(name) for name in names.values())
    label = len(f"rank {max(timeline.schedule)}")
    rows = []
    for rank, program in timeline.schedule.items():
        cells = ["." * width] * round(timeline.makespan / unit)
        for action in program:
            first, last = (round((t[action] - origin) / unit) for t in (timeline.start, timeline.end))
            cells[first:last] = [names[action].ljust(width)] * (last - first)
        rows.append(f"{f'rank {rank}'.ljust(label)} | {' '.join(cells)}".rstrip())
    return "\n".join(rows)
