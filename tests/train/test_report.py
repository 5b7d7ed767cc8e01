"""Between the lines of the log nothing is worked out and nothing is written."""

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.observe.log import Log
from megatron_aquila.observe.meters import ThroughputMeter, Value
from megatron_aquila.observe.writers import Writers
from megatron_aquila.parallel.context import Group
from megatron_aquila.train import report
from megatron_aquila.train.report import RankZeroReporter
from tests.train.test_faults import REPORT


class Counted(ThroughputMeter):
    """Counts the rows it is asked for."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(flops_per_token=1.0, flops_per_token_full=1.0, num_devices=1, total_samples=800, **settings)
        self.rows: list[int] = []

    def row(self, report: Any) -> dict[str, Value]:
        self.rows.append(report.step)
        return super().row(report)


class Kept:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Value]] = []

    def write(self, row: Mapping[str, Value]) -> None:
        self.rows.append(row)

    def close(self) -> None:
        pass


def test_only_the_rows_that_are_written_are_made_and_the_time_left_counts_every_step() -> None:
    def told(log_interval: int) -> tuple[list[int], list[Mapping[str, Value]]]:
        ticks = iter(range(1, 100))
        meter, kept, quiet = Counted(clock=lambda: float(next(ticks))), Kept(), Log(enabled=False)
        reporter = RankZeroReporter(log=quiet, meter=meter, writers=Writers([kept], quiet), log_interval=log_interval)
        for number in range(1, 13):
            reporter.step(replace(REPORT, step=number, consumed_samples=8 * number, applied=number != 7))
        return meter.rows, kept.rows

    made, written = told(5)
    assert made == [row["step"] for row in written] == [5, 7, 10], "a step that was not applied is always told"
    every = {row["step"]: row for row in told(1)[1]}
    assert written == [every[number] for number in made]


@pytest.mark.parametrize(
    ("names", "peak", "told"),
    [
        (["NVIDIA A800-SXM4-80GB", "NVIDIA A100-SXM4-40GB"], 312e12, ""),
        (["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB"], 537.8e12, ""),
        (["NVIDIA A100-SXM4-40GB", "BI100"], None, "no peak is known for BI100 in bf16"),
    ],
)
def test_the_peak_of_mixed_devices_is_their_mean(
    names: list[str], peak: float | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[0])
    monkeypatch.setattr(report, "gather_objects", lambda mine, world: names)
    world = Group("world", 0, len(names), tuple(range(len(names))), None)
    found = report.device_peak(RunConfig(), torch.device("cuda", 0), Log(stream=stream), world)
    assert found == (None if peak is None else pytest.approx(peak))
    assert told in stream.getvalue()
    assert bool(told) == bool(stream.getvalue())
