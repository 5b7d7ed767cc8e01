"""``--export-hf-every``: published weights of a checkpoint, made by a process of their own while the run goes on."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from megatron_aquila.checkpoint.conversion import CERTIFICATE, content_of
from megatron_aquila.checkpoint.folders import step_of
from megatron_aquila.checkpoint.huggingface import read_json
from megatron_aquila.checkpoint.retention import add_tag, remove_tag, tags
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import CheckpointError

PACKAGE_PARENT = Path(__file__).parents[2]
RELEASES = "hf"  # the folder, in that of the run
_PIN = "export-hf-"
_TERMINATES_SECONDS = 10.0


class Telling(Protocol):
    """Who is told what became of a release."""

    def note(self, text: str | None) -> None:
        """Print a line."""

    def record(self, event: str, **fields: Any) -> None:
        """Write an event into the ledger."""


@dataclass(frozen=True, slots=True)
class _UnderWay:
    checkpoint: Path
    process: "subprocess.Popen[bytes]"
    began: float


class Releases:
    """Converts every n-th checkpoint with ``aquila convert``, at the lowest priority, one at a time. Local, on rank 0.

    A checkpoint that is to be converted has a tag until that is done: retention leaves it, and a run that was stopped
    takes it up again. Whatever goes wrong is told and never raised.
    """

    def __init__(self, config: RunConfig, rank: int, reporter: Telling) -> None:
        self._root, self._every = config.checkpoint.save, config.checkpoint.export_hf_every
        self._reporter = reporter
        self._is_on = self._root is not None and self._every is not None and rank == 0
        data = config.data
        names = (data.vocab_file, data.merge_file, data.special_tokens_file, data.tokenizer_model)
        self._flags = ["--no-tokenizer"] if all(name is None for name in names) else []
        self._under_way: _UnderWay | None = None
        self._waiting: list[Path] = []

    def begin(self) -> None:
        """Take up what an earlier process of the run left."""
        if not self._is_on:
            return
        if find_spec("transformers") is None:
            self._flags.append("--no-verify")
            self._reporter.note("transformers is not installed: releases are not compared with it")
        for tag, name in sorted(tags(self._run).items()):
            if tag.startswith(_PIN) and (self._run / name).is_dir():
                self._waiting.append(self._run / name)
        self.poll()

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is whole on the disk. On return it is safe from retention where it is to be released."""
        step = step_of(checkpoint)
        if not self._is_on or step is None or self._every is None or step % self._every != 0:
            return
        try:
            add_tag(checkpoint, _PIN + checkpoint.name)
        except (OSError, CheckpointError) as error:
            self._reporter.note(f"{checkpoint} is not released: {error}")
            return
        self._waiting.append(self._run / checkpoint.name)
        self.poll()

    def poll(self) -> None:
        """Tell of a release that is done, and begin the next. Returns at once."""
        if self._under_way is not None and (code := self._under_way.process.poll()) is not None:
            self._ended("done" if code == 0 else "failed")
        while self._under_way is None and self._waiting:
            self._start(self._waiting.pop(0))

    def wait(self, is_asked: Callable[[], bool]) -> None:
        """Until all releases are done, or ``is_asked`` to stop: those that are not are left to the next run."""
        if self._under_way is not None:
            name = self._under_way.checkpoint.name
            self._reporter.note(f"waits for the release of {name}; asked to stop, it leaves it to the next run")
        while self._under_way is not None and not is_asked():
            time.sleep(0.1)
            self.poll()
        self.close()

    def close(self) -> None:
        """Stop what is under way. Tags and half a conversion stay, for the next run to take up."""
        self._waiting.clear()
        if self._under_way is None:
            return
        process = self._under_way.process
        process.terminate()
        try:
            process.wait(_TERMINATES_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._ended("stopped")

    @property
    def _run(self) -> Path:
        assert self._root is not None, "a run without a folder releases nothing"
        return self._root

    def _output(self, checkpoint: Path) -> Path:
        return self._run / RELEASES / checkpoint.name

    def _start(self, checkpoint: Path) -> None:
        output = self._output(checkpoint)
        if not self._is_free(checkpoint, output):
            return
        command = [sys.executable, "-m", "megatron_aquila", "convert", "--from", str(checkpoint), "--to", str(output)]
        paths = [str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # no device, no rank, and one thread: the run has the machine
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        try:
            output.parent.mkdir(exist_ok=True)
            with output.with_suffix(".log").open("ab") as log:
                process = subprocess.Popen(
                    [*command, *self._flags],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # a signal to the run is the run's to pass on
                )
            os.setpriority(os.PRIO_PROCESS, process.pid, 19)
        except OSError as error:
            self._reporter.note(f"{checkpoint} is not released: {error}")
            return
        self._under_way = _UnderWay(checkpoint, process, time.monotonic())

    def _is_free(self, checkpoint: Path, output: Path) -> bool:
        """Whether ``output`` is still to be made. A release of these very weights stands; one of others, which a run
        that went back has left, gets another name; one that does not say of which it is stays as it is.
        """
        try:
            if not output.exists():
                return True
            released = read_json(output / CERTIFICATE).get("content")
            if released == content_of(CheckpointReader(checkpoint)):
                self._reporter.note(f"{output} is a whole release of {checkpoint.name}")
                self._untag(checkpoint)
                return False
            if not isinstance(released, str):
                raise CheckpointError(f"{output} does not say of which weights it is; rename it to have it made anew")
            other = output.with_name(f"{output.name}.of-{released[:12]}")
            os.rename(output, other)
        except (OSError, CheckpointError) as error:
            self._reporter.note(f"{checkpoint} is not released: {error}")
            self._untag(checkpoint)
            return False
        self._reporter.note(f"{output} was of an abandoned branch of the run: it is {other.name} from now on")
        return True

    def _ended(self, outcome: str) -> None:
        assert self._under_way is not None, "nothing was under way"
        found, self._under_way = self._under_way, None
        output, seconds = self._output(found.checkpoint), time.monotonic() - found.began
        log = output.with_suffix(".log")
        self._reporter.record("export", checkpoint=found.checkpoint.name, outcome=outcome, seconds=round(seconds, 1))
        self._reporter.note(
            f"release of {found.checkpoint.name} in {output}: {outcome} after {seconds:.1f} s, see {log}"
        )
        if outcome != "stopped":
            self._untag(found.checkpoint)

    def _untag(self, checkpoint: Path) -> None:
        try:
            remove_tag(self._run, _PIN + checkpoint.name)
        except OSError as error:
            self._reporter.note(f"{checkpoint} keeps its tag: {error}")
