"""``--profile-steps``: torch's profiler around some steps of the run, its trace, and what the trace says."""

import gzip
import json
import os
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_aquila.config.profile import profiled_steps
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.observe.profile import WINDOW, Profile, profile_of
from megatron_aquila.train.report import log_folder


class StepProfiler:
    """Profiles the steps that the settings name, on the ranks that they name; does nothing elsewhere. Local.

    The host waits for the device before the first of these steps and after the last, not between them.
    """

    def __init__(self, config: RunConfig, rank: int, device: torch.device) -> None:
        steps = profiled_steps(config.observe)
        self._steps = steps if rank in config.observe.profile_ranks else range(0)
        self._folder, self._rank, self._device = log_folder(config), rank, device
        self._first: int | None = None  # of the steps under way, None while nothing is profiled
        self._running = ExitStack()
        self._profiler: profile | None = None

    def before(self, step: int) -> None:
        """Begin with the first of the steps that this run comes to: a resumed one may be past some."""
        if step not in self._steps or self._first is not None:
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device.type == "cuda")
        self._first = step
        self._settle()
        self._profiler = self._running.enter_context(profile(activities=activities, acc_events=True))
        self._running.enter_context(record_function(WINDOW))

    def after(self, step: int, *, last: bool) -> str | None:
        """End with the last of the steps, or of the run. Writes the trace; returns what it says, to be printed."""
        if self._first is None or not (last or step == self._steps[-1]):
            return None
        name, num_steps = f"rank-{self._rank}-steps-{self._first}-{step}", step - self._first + 1
        self.close()
        self._first, self._steps = None, range(0)
        assert self._profiler is not None, "steps were profiled without a profiler"
        assert self._folder is not None, "--profile-steps without a folder"
        try:
            path = write_trace(self._profiler, self._folder / "profile" / f"{name}.json.gz")
        except OSError as error:
            return f"the profile could not be written: {error}; training goes on"
        try:
            lines = read_profile(path).lines(num_steps)
        except (KeyError, ValueError) as error:  # another version's trace; kineto's is at times no JSON
            lines = [f"  it is not understood here: {type(error).__name__}: {error}"]
        return "\n".join([f"profile of {num_steps} steps: {path}", *lines])

    def close(self) -> None:
        """Stop profiling, also where a step failed; what was not written is lost."""
        self._settle()
        self._running.close()

    def _settle(self) -> None:
        if self._first is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def write_trace(profiler: profile, path: Path) -> Path:
    """Write the trace, gzipped, beside its place and rename it; returns the place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"tmp-{path.name}")
    profiler.export_chrome_trace(str(beside))
    os.replace(beside, path)
    return path


def read_profile(path: Path) -> Profile:
    """What a trace of ``write_trace`` says."""
    with gzip.open(path) as file:
        return profile_of(json.load(file)["traceEvents"])
