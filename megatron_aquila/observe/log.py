"""Lines for a person: a live progress bar where there is a terminal, plain lines elsewhere."""

import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from megatron_aquila.observe.meters import Value


class Log:
    """Prints to ``stream`` (default stdout); silent when not ``enabled``, as on every rank but the one that reports."""

    def __init__(self, *, stream: TextIO | None = None, enabled: bool = True) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._enabled = enabled
        self._console = Console(file=self._stream, highlight=False, markup=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def line(self, text: str) -> None:
        """Print ``text`` on a line of its own, above the progress bar if one is shown."""
        if not self._enabled:
            return
        if self._console.is_terminal:
            self._console.print(text)
        else:
            print(text, file=self._stream, flush=True)

    def section(self, title: str, items: Mapping[str, str]) -> None:
        """Print ``title`` and one indented line an item, names aligned."""
        self.line(title)
        width = max((len(name) for name in items), default=0)
        for name, text in items.items():
            self.line(f"  {name:<{width}}  {text}")

    def progress(self, done: int, total: int, note: str) -> None:
        """Move the progress bar to ``done`` of ``total``; there is none where the stream is not a terminal."""
        if not self._enabled or not self._console.is_terminal:
            return
        if self._progress is None:
            columns = TextColumn("{task.percentage:>5.1f} %"), BarColumn(), TextColumn("{task.description}")
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task(note, total=total)
            self._progress.start()
        assert self._task is not None, "the progress bar has no task"
        self._progress.update(self._task, completed=done, description=note)

    def close(self) -> None:
        """Leave the terminal as it was found."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def duration(seconds: float) -> str:
    """``3725`` seconds as ``1:02:05``; days are written out."""
    return str(timedelta(seconds=round(seconds)))


def step_line(row: Mapping[str, Value], total_samples: int, *, valid_sets: Sequence[str] = ()) -> str:
    """One step of the log as a line; figures that the row does not hold are left out.

    Of losses by source those of ``valid_sets`` are shown; the sources of a blend may be hundreds.
    """
    numbers = {name: value for name, value in row.items() if not isinstance(value, str)}

    def part(name: str, text: str, scale: float = 1.0) -> list[str]:
        return [text.format(numbers[name] * scale)] if name in numbers else []

    done = numbers.get("consumed_samples", 0)
    parts = [
        f"step {row['step']}",
        f"samples {done:,}/{total_samples:,} ({100 * done / total_samples:.1f} %)",
        *part("loss", "loss {:.4f}"),
        *part("valid_loss", "validation loss {:.4f}"),
        *(f"of {name} {loss:.4f}" for name in valid_sets if (loss := numbers.get(f"valid_loss/{name}")) is not None),
        *part("grad_norm", "grad norm {:.3f}"),
        *part("lr", "lr {:.3e}"),
        *(part("loss_scale", "loss scale {:,.10g}") if numbers.get("loss_scale") != 1 else []),
        *part("batch_size", "batch {:.0f}"),
        *part("tokens_per_second", "{:,.0f} tok/s"),
        *part("tokens_per_second_per_device", "{:,.0f} tok/s/device"),
        *part("tflops_per_device", "{:.3g} TFLOP/s/device"),
        *part("mfu", "MFU {:.1f} % (causal)", 100),
        *part("bf16_equivalent", "{:.1f} % of the bf16 peak (fp8 products; no MFU)", 100),
        *part("hfu", "HFU {:.1f} % (counting recomputation)", 100),
        *part("mfu_full_attention", "{:.1f} % (counting full attention)", 100),
        *part("gemm_share", "{:.1f} % of this CPU's measured GEMM rate", 100),
        *part("memory_gib", "{:.2f} GiB"),
        *part("slowest_rank", "slowest rank {:.0f}"),
        *part("slowest_seconds", "{:.3f} s a step of its own"),
        *part("median_seconds", "its peers' median {:.3f} s"),
        *part("data_seconds", "data {:.0f} ms", 1000),
        *part("save_stall_seconds", "stood still for {:.2f} s to save"),
        *(["update skipped"] if numbers.get("applied") == 0 else []),
        *([f"left {duration(numbers['seconds_left'])}"] if "seconds_left" in numbers else []),
    ]
    return " | ".join(parts)
