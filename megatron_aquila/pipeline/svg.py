"""Timelines as one SVG picture, one below the other at one scale of time: one row a rank, one box an action."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from megatron_aquila.pipeline.action import Action, Op
from megatron_aquila.pipeline.simulate import Timeline

WIDTH, LEFT, RIGHT = 1600, 92, 108  # in pixels: the picture, and what stands beside the boxes
ROW, BOX = 26, 22
MARGIN, TITLE, AXIS, LEGEND = 24, 34, 34, 40
INK, FAINT, IDLE, LINE, PAPER = "#1f2328", "#59636e", "#e6e9ed", "#d0d7de", "#ffffff"
# Okabe and Ito's, which are told apart with any colour vision.
COLOURS = {Op.F: "#0072b2", Op.B: "#d55e00", Op.I: "#e69f00", Op.W: "#009e73"}
MEANINGS = {Op.F: "forward", Op.B: "backward", Op.I: "input gradient", Op.W: "weight gradient"}
PALEST = 0.6  # how far towards white a rank's last chunk goes
FONT = "Helvetica Neue, Helvetica, Arial, DejaVu Sans, sans-serif"


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One timeline of the picture, what it is called, and a few words on what it costs."""

    timeline: Timeline
    title: str
    note: str


def svg(panels: Sequence[Panel], heading: str) -> str:
    """``panels`` as an SVG document: ranks and their peak activations beside the boxes, a time axis and a legend below.

    A box is named by its microbatch; the later the chunk, the paler it is.
    """
    longest = max(panel.timeline.makespan for panel in panels)
    scale = (WIDTH - LEFT - RIGHT) / longest
    parts = [_text(MARGIN, MARGIN + 8, heading, size=17, weight=600)]
    top = MARGIN + 18
    for panel in panels:
        parts += _panel(panel, top, scale)
        top += TITLE + ROW * len(panel.timeline.schedule) + 10
    parts += _axis(longest, scale, top)
    parts += _legend([panel.timeline for panel in panels], top + AXIS)
    height = top + AXIS + LEGEND
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="{FONT}" '
            f'font-size="13" fill="{INK}">',
            f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def _panel(panel: Panel, top: int, scale: float) -> list[str]:
    """Title, note and a row a rank."""
    timeline = panel.timeline
    parts = [
        _text(MARGIN, top + 22, panel.title, size=14, weight=600),
        _text(WIDTH - RIGHT, top + 22, panel.note, anchor="end"),
        _text(WIDTH - MARGIN, top + 22, "peak held", anchor="end", fill=FAINT),
    ]
    names, boxes, origin = [], [], timeline.origin
    for row, (rank, program) in enumerate(timeline.schedule.items()):
        y = top + TITLE + row * ROW
        parts.append(_text(MARGIN, y + 15, f"rank {rank}", fill=FAINT))
        parts.append(_text(WIDTH - MARGIN, y + 15, f"{timeline.peak_microbatches(rank):.3g}", anchor="end"))
        boxes.append(_rect(LEFT, y, timeline.makespan * scale, IDLE))
        fills = _fills(program)
        for action in program:
            x, width = (
                LEFT + (timeline.start[action] - origin) * scale,
                (timeline.end[action] - timeline.start[action]) * scale,
            )
            fill = fills[action.op, action.stage]
            boxes.append(_rect(x, y, width, fill, f"<title>{action}</title>"))
            name = str(action.microbatch)
            if width > 4 + 6 * len(name):
                names.append(f'<text x="{x + width / 2:.2f}" y="{y + 15}" fill="{_readable_on(fill)}">{name}</text>')
    return [
        *parts,
        f'<g stroke="{PAPER}" stroke-width="0.7">',
        *boxes,
        '</g>\n<g font-size="11" text-anchor="middle">',
        *names,
        "</g>",
    ]


def _axis(longest: float, scale: float, top: int) -> list[str]:
    """A line with ticks at round times."""
    step = _round_step(longest / 12)
    parts = [f'<path d="M{LEFT} {top}H{WIDTH - RIGHT}" stroke="{LINE}"/>', _text(MARGIN, top + 20, "time", fill=FAINT)]
    for tick in range(math.floor(longest / step) + 1):
        x = LEFT + tick * step * scale
        parts.append(f'<path d="M{x:.2f} {top}v5" stroke="{LINE}"/>')
        parts.append(_text(x, top + 20, f"{tick * step:g}", anchor="middle", fill=FAINT))
    return parts


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... (and their fractions) that is no less than ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= least * (1 - 1e-9))


def _legend(timelines: Sequence[Timeline], top: int) -> list[str]:
    """What the colours mean; only what the picture has."""
    ops = {action.op for timeline in timelines for action in timeline.start}
    entries = [(COLOURS[op], f"{op} {MEANINGS[op]}") for op in Op if op in ops] + [(IDLE, "waiting")]
    parts, x = [], float(LEFT)
    for fill, words in entries:
        parts += [_rect(x, top + 4, 14, fill, height=14), _text(x + 20, top + 16, words)]
        x += 46 + 6.6 * len(words)
    if any(timeline.num_stages > len(timeline.schedule) for timeline in timelines):
        for fill in (_towards_white(COLOURS[Op.F], PALEST * at / 3) for at in range(4)):
            parts.append(_rect(x, top + 4, 14, fill, height=14))
            x += 14
        parts.append(_text(x + 6, top + 16, "a rank's first chunk to its last"))
    held = "peak held: microbatches whose activations a rank keeps"
    return [*parts, _text(WIDTH - MARGIN, top + 16, held, anchor="end", fill=FAINT)]


def _fills(program: Iterable[Action]) -> dict[tuple[Op, int], str]:
    """The colour of each (op, stage) of one rank."""
    kinds = {(action.op, action.stage) for action in program}
    stages = sorted({stage for _, stage in kinds})
    last = max(1, len(stages) - 1)
    return {(op, stage): _towards_white(COLOURS[op], PALEST * stages.index(stage) / last) for op, stage in kinds}


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


def _towards_white(colour: str, share: float) -> str:
    return "#" + "".join(f"{round(value + (255 - value) * share):02x}" for value in _channels(colour))


def _readable_on(fill: str) -> str:
    """White or ink, whichever stands out."""
    red, green, blue = _channels(fill)
    return PAPER if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else INK  # the eye's weights of the channels


def _rect(x: float, y: float, width: float, fill: str, inside: str = "", height: int = BOX) -> str:
    shape = f'<rect x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{height}" fill="{fill}"'
    return f"{shape}>{inside}</rect>" if inside else f"{shape}/>"


def _text(
    x: float, y: float, words: str, *, size: int = 13, weight: int = 400, anchor: str = "start", fill: str = INK
) -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{fill}"'
    return f'<text x="{x:.2f}" y="{y}" {style}>{escape(words, quote=False)}</text>'
