"""Where profiled steps spent their time: a profiler's trace as shares of the wall, largest kernels and gaps.

Pure: from the events of a Chrome trace, as torch's profiler writes them, to lines of text. Times are in microseconds.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Part = Literal["GEMM", "attention", "optimizer", "memory-bound", "communication"]

# Names of kernels and operators by what bounds them; the first that is found decides, and what none knows is bound by
# memory. Attention stands before GEMM: its kernels too are built of cutlass and xmma. cuDNN's backward of it is three
# kernels, of which two say only what they compute.
NAMES: Mapping[Part, str] = {
    "communication": r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|send_?recv",
    "attention": r"flash|fmha|attention|sdpa|attn|dot_do_o|convert_dq",
    "GEMM": r"gemm|nvjet|cublas|cutlass|xmma|wgmma|splitk|\bmatmul|::_?(grouped_|scaled_)?b?(add)?mm_?\b|::baddbmm",
    "optimizer": r"adam|multi_tensor_apply",
}
# Where parts run at the same time, the time is the first one's: communication counts where nothing hides it.
PRECEDENCE: tuple[Part, ...] = ("GEMM", "attention", "optimizer", "memory-bound", "communication")

WINDOW, OPTIMIZER = "profiled steps", "optimizer"  # annotations in the trace: all of it, and the update of the weights
# An update's own time on a CPU, in no operator, is our C++'s, unless it waits for what another thread does.
ORDER: tuple[Part, ...] = (*PRECEDENCE, "optimizer")
DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
ANNOTATIONS = {"user_annotation", "gpu_user_annotation"}


@dataclass(frozen=True, slots=True)
class Span:
    """Work of one call from ``start`` to ``stop``. A call whose callees take their part of it leaves several."""

    name: str
    part: Part
    call: int
    start: float
    stop: float


@dataclass(frozen=True, slots=True)
class Gap:
    """Nothing runs from ``start`` to ``stop``, between the two named pieces of work; None at the window's ends."""

    start: float
    stop: float
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True)
class Profile:
    """The work within a window of time. ``is_device``: kernels of a device, else operators of the CPU by self time."""

    spans: tuple[Span, ...]
    start: float
    stop: float
    is_device: bool

    @property
    def wall(self) -> float:
        """The window's length."""
        return self.stop - self.start

    def shares(self) -> dict[Part | Literal["idle"], float]:
        """Shares of the wall, which sum to 1. What overlaps is counted once, as ``PRECEDENCE`` says."""
        busy = dict.fromkeys(PRECEDENCE, 0.0)
        for part, length in _exposed(self.spans):
            busy[part] += length
        shares: dict[Part | Literal["idle"], float] = {part: time / self.wall for part, time in busy.items()}
        return shares | {"idle": max(0.0, 1 - sum(shares.values()))}

    def largest(self, count: int = 10) -> list[tuple[str, int, float]]:
        """``(name, calls, time)`` of the names that took most time, largest first."""
        times: dict[str, float] = defaultdict(float)
        calls: dict[str, set[int]] = defaultdict(set)
        for span in self.spans:
            times[span.name] += span.stop - span.start
            calls[span.name].add(span.call)
        names = sorted(times, key=lambda name: (-times[name], name))[:count]
        return [(name, len(calls[name]), times[name]) for name in names]

    def gaps(self, count: int = 5) -> list[Gap]:
        """The longest times in which nothing runs, longest first."""
        found, last, until = [], None, self.start
        for span in sorted(self.spans, key=lambda span: span.start):
            if span.start > until:
                found.append(Gap(until, span.start, last, span.name))
            if span.stop > until:
                last, until = span.name, span.stop
        if self.stop > until:
            found.append(Gap(until, self.stop, last, None))
        return sorted(found, key=lambda gap: gap.start - gap.stop)[:count]

    def lines(self, num_steps: int) -> list[str]:
        """The profile in words; times in ms a step."""
        ms = 1e3 * num_steps
        what = "kernels" if self.is_device else "operators by self time"
        shares = ", ".join(f"{part} {100 * share:.1f} %" for part, share in self.shares().items())
        rows = [f"  {self.wall / ms:.2f} ms a step: {shares}", f"  largest {what}: ms a step, % of the wall, calls"]
        for name, calls, time in self.largest():
            rows.append(f"    {time / ms:10.3f} {100 * time / self.wall:5.1f} {calls:6d}  {_short(name)}")
        rows.append("  longest gaps: ms, and where in the profiled time")
        for gap in self.gaps():
            between = f"after {_short(gap.before or 'the start')}, before {_short(gap.after or 'the end')}"
            rows.append(f"    {(gap.stop - gap.start) / 1e3:10.3f} at {(gap.start - self.start) / 1e3:.3f}, {between}")
        return rows


def classify(name: str) -> Part:
    """What bounds a kernel or operator, by its name."""
    found = (part for part, pattern in NAMES.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, "memory-bound")


def profile_of(events: Iterable[Mapping[str, Any]]) -> Profile:
    """The profile of a Chrome trace's ``traceEvents``, which hold one annotation ``WINDOW``."""
    timed = [event for event in events if event.get("ph") == "X"]
    (window,) = (event for event in timed if event["name"] == WINDOW and event["cat"] == "user_annotation")
    start, stop = window["ts"], window["ts"] + window["dur"]
    is_device = any(event["cat"] in DEVICE_WORK for event in timed)
    wanted = DEVICE_WORK if is_device else {"cpu_op"}
    lanes: dict[tuple[Any, Any], list[Mapping[str, Any]]] = defaultdict(list)
    for event in timed:
        if event["cat"] in wanted or (event["cat"] in ANNOTATIONS and event["name"] == OPTIMIZER):
            lanes[event["pid"], event["tid"]].append(event)
    spans = (span for lane in lanes.values() for span in _innermost(lane, is_device=is_device))
    clipped = (
        Span(span.name, span.part, span.call, max(start, span.start), min(stop, span.stop))
        for span in spans
        if span.start < stop and span.stop > start
    )
    return Profile(tuple(clipped), start, stop, is_device)


def _innermost(lane: Sequence[Mapping[str, Any]], *, is_device: bool) -> Iterator[Span]:
    """The work of one thread or stream, each moment given to the innermost call: what is left is its self time.

    Between the kernels of a device's update nothing runs; between the operators of a CPU's our own code does.
    """
    parts: dict[str, Part] = {}
    around: list[Mapping[str, Any]] = []
    now = 0.0

    def until(moment: float) -> Iterator[Span]:
        event = around[-1]
        if moment <= now or (is_device and event["cat"] in ANNOTATIONS):
            return
        part = parts.setdefault(event["name"], classify(event["name"]))
        if part != "communication" and any(outer["cat"] in ANNOTATIONS for outer in around):
            part = "optimizer"
        yield Span(event["name"], part, id(event), now, moment)

    def outermost_first(event: Mapping[str, Any]) -> tuple[float, float, bool]:
        """An annotation may begin and end with the one kernel in it."""
        return event["ts"], -event["dur"], event["cat"] not in ANNOTATIONS

    for event in sorted(lane, key=outermost_first):
        while around and _end(around[-1]) <= event["ts"]:
            yield from until(_end(around[-1]))
            now = max(now, _end(around.pop()))
        if around:
            yield from until(event["ts"])
        now = max(now, event["ts"])
        around.append(event)
    while around:
        yield from until(_end(around[-1]))
        now = max(now, _end(around.pop()))


def _exposed(spans: Iterable[Span]) -> Iterator[tuple[Part, float]]:
    """Stretches of time, each given to the first of ``ORDER`` that runs in it."""
    borders = [
        (time, change, len(PRECEDENCE) if span.name == OPTIMIZER else PRECEDENCE.index(span.part))
        for span in spans
        for time, change in ((span.start, 1), (span.stop, -1))
    ]
    running, now = [0] * len(ORDER), 0.0
    for time, change, place in sorted(borders):
        first = next((part for part, count in zip(ORDER, running, strict=True) if count > 0), None)
        if first is not None:
            yield first, time - now
        running[place] += change
        now = time


def _end(event: Mapping[str, Any]) -> float:
    return float(event["ts"] + event["dur"])


def _short(name: str, width: int = 90) -> str:
    return name if len(name) <= width else f"{name[: width - 3]}..."
