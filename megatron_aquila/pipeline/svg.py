"""A timeline as an SVG picture: one row a rank, one box an action."""

from megatron_aquila.pipeline.action import Action, Op
from megatron_aquila.pipeline.simulate import Timeline

WIDTH, ROW, LABEL, TITLE = 1600, 28, 56, 24  # in pixels
COLOURS = {Op.F: "#4c78a8", Op.B: "#54a24b", Op.I: "#72b7b2", Op.W: "#eeca3b"}
MEANINGS = {Op.F: "forward", Op.B: "backward", Op.I: "input gradient", Op.W: "weight gradient"}


def svg(timeline: Timeline, title: str) -> str:
    """``timeline`` as an SVG document. A box is named by its microbatch; the later its chunk, the paler it is."""
    ranks = len(timeline.schedule)
    origin, scale = min(timeline.start.values()), (WIDTH - LABEL) / timeline.makespan
    height = TITLE + ROW * ranks + TITLE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(4, 16, title),
    ]
    for row, (rank, program) in enumerate(timeline.schedule.items()):
        top = TITLE + row * ROW
        parts.append(_text(4, top + 18, f"rank {rank}"))
        stages = sorted({action.stage for action in program})
        for action in program:
            left = LABEL + (timeline.start[action] - origin) * scale
            width = (timeline.end[action] - timeline.start[action]) * scale
            opacity = 1 - 0.6 * stages.index(action.stage) / len(stages)
            parts.append(_box(action, left, top, width, opacity))
    left = float(LABEL)
    for op in Op:
        if any(action.op is op for action in timeline.start):
            parts.append(f'<rect x="{left:g}" y="{height - 16}" width="10" height="10" fill="{COLOURS[op]}"/>')
            parts.append(_text(left + 14, height - 7, f"{op} {MEANINGS[op]}"))
            left += 130
    return "\n".join([*parts, "</svg>", ""])


def _box(action: Action, left: float, top: float, width: float, opacity: float) -> str:
    """One action, its name as the tool tip, its microbatch inside where that fits."""
    label = str(action.microbatch)
    box = (
        f'<rect x="{left:.2f}" y="{top + 2}" width="{width:.2f}" height="{ROW - 4}" fill="{COLOURS[action.op]}" '
        f'fill-opacity="{opacity:.2f}" stroke="#ffffff" stroke-width="0.5"><title>{action}</title></rect>'
    )
    return box + (_text(left + 2, top + 18, label) if width > 4 + 7 * len(label) else "")


def _text(x: float, y: float, text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f'<text x="{x:.2f}" y="{y:.2f}">{escaped}</text>'
