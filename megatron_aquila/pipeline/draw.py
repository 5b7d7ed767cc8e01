"""A timeline as text: one row a rank, one column a unit of time."""

from megatron_aquila.pipeline.simulate import Timeline


def draw(timeline: Timeline, width: int | None = None) -> str:
    """``timeline`` as text, e.g. ``rank 0 | F0 F1 .. B0 B0``. A column is the shortest action; ``.`` is idle time.

    An action that lasts several columns fills them all; ends are rounded to whole columns. Rows longer than ``width``
    characters go on in a further block.
    """
    unit = min(timeline.end[action] - timeline.start[action] for action in timeline.start)
    origin = min(timeline.start.values())
    num_stages = 1 + max(action.stage for action in timeline.start)
    chunked = num_stages > len(timeline.schedule)
    names = {a: str(a) if chunked else f"{a.op}{a.microbatch}" for a in timeline.start}
    cell = max(len(name) for name in names.values())
    columns = round(timeline.makespan / unit)
    labels = {rank: f"rank {rank}" for rank in timeline.schedule}
    label = max(len(text) for text in labels.values())
    rows = {}
    for rank, program in timeline.schedule.items():
        rows[rank] = ["." * cell] * columns
        for action in program:
            first, last = (round((t[action] - origin) / unit) for t in (timeline.start, timeline.end))
            rows[rank][first:last] = [names[action].ljust(cell)] * (last - first)
    each = columns if width is None else max(1, (width - label - 2) // (cell + 1))
    blocks = [
        "\n".join(
            f"{labels[rank].ljust(label)} | {' '.join(row[at : at + each])}".rstrip() for rank, row in rows.items()
        )
        for at in range(0, columns, each)
    ]
    return "\n\n".join(blocks)
