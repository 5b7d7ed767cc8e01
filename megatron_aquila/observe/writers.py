"""Where the rows of the log go: the console, a JSON Lines file, TensorBoard, Weights & Biases."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_aquila.errors import DataError
from megatron_aquila.observe.log import Log, step_line
from megatron_aquila.observe.meters import Row, Value

LOG_NAME = "log.jsonl"
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no words for them


class Writer(Protocol):
    """Takes the rows of a run. A row has at least ``step``."""

    def write(self, row: Mapping[str, Value]) -> None:
        """Keep one row."""

    def close(self) -> None:
        """Finish; nothing is written afterwards."""


class ConsoleWriter:
    """A line a row, and the progress bar. ``valid_sets`` are the named sets whose losses are shown."""

    def __init__(self, log: Log, *, total_samples: int, valid_sets: Sequence[str] = ()) -> None:
        self._log = log
        self._total_samples = total_samples
        self._valid_sets = valid_sets

    def write(self, row: Mapping[str, Value]) -> None:
        """Print the row."""
        line = step_line(row, self._total_samples, valid_sets=self._valid_sets)
        self._log.line(line)
        if isinstance(done := row.get("consumed_samples"), int):
            self._log.progress(done, self._total_samples, line.rpartition(" | ")[2])

    def close(self) -> None:
        """Take the progress bar away."""
        self._log.close()


class JsonLinesWriter:
    """Appends one JSON object a row to ``path``; a resumed run goes on in the same file.

    A row is one write to the file, so a killed run leaves whole lines; should a full disk have torn the last one, it is
    cut off when the file is opened again.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        self._file.seek(0)
        whole = self._file.read().rfind(b"\n") + 1
        self._file.truncate(whole)

    def write(self, row: Mapping[str, Value]) -> None:
        """Append the row."""
        finite = {name: _json_value(value) for name, value in row.items()}
        self._file.write(json.dumps(finite, ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardWriter:
    """Scalars by step into the event files of ``folder``; rows of an abandoned branch are purged after a resume."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._events: Any = None

    def write(self, row: Mapping[str, Value]) -> None:
        """Add the row's numbers at its step."""
        step = row["step"]
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter  # imports tensorboard: only where it is asked for

            self._events = SummaryWriter(str(self._folder), purge_step=step)
        for name, value in row.items():
            if name != "step" and not isinstance(value, str):
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        if self._events is not None:
            self._events.close()


class WandbWriter:
    """A Weights & Biases run kept on disk, unless ``WANDB_MODE`` says otherwise; ``wandb sync`` uploads it later.

    Raises ``wandb.Error`` where an online run cannot begin.
    """

    def __init__(self, wandb: Any, *, project: str, name: str | None, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE", "offline")  # its own default is to upload
        self._run = wandb.init(project=project, name=name, dir=str(folder), mode=mode)

    def write(self, row: Mapping[str, Value]) -> None:
        """Log the row at its step."""
        self._run.log(dict(row), step=row["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Writers:
    """Several writers as one. One that fails, as on a full disk, is said once and left out: training goes on."""

    def __init__(self, writers: Sequence[Writer], log: Log) -> None:
        self._writers = list(writers)
        self._log = log

    def write(self, row: Mapping[str, Value]) -> None:
        """Pass the row to each."""
        for writer in tuple(self._writers):
            try:
                writer.write(row)
            except OSError as error:
                self._writers.remove(writer)
                self._log.line(f"{type(writer).__name__} stops at step {row['step']}: {error}")

    def close(self) -> None:
        """Close each."""
        for writer in self._writers:
            writer.close()


def open_writers(
    log: Log,
    *,
    total_samples: int,
    valid_sets: Sequence[str] = (),
    log_dir: Path | None = None,
    tensorboard_dir: Path | None = None,
    wandb_project: str | None = None,
    wandb_name: str | None = None,
    wandb_dir: Path = Path("wandb"),
) -> Writers:
    """The writers that the settings ask for; the one rank that reports calls this.

    The console is always there. ``None`` leaves a writer out. A wandb that is missing, or whose run cannot begin, is
    said in one line and does not stop the run.
    """
    writers: list[Writer] = [ConsoleWriter(log, total_samples=total_samples, valid_sets=valid_sets)]
    if log_dir is not None:
        writers.append(JsonLinesWriter(log_dir / LOG_NAME))
    if tensorboard_dir is not None:
        writers.append(TensorBoardWriter(tensorboard_dir))
    if wandb_project is not None:
        try:
            import wandb
        except ImportError:
            log.line("wandb is not installed: no Weights & Biases run is written (pip install wandb)")
        else:
            try:
                writers.append(WandbWriter(wandb, project=wandb_project, name=wandb_name, folder=wandb_dir))
            except wandb.Error as error:
                why = str(error).partition("\n")[0]
                log.line(f"wandb: {why}: no Weights & Biases run is written (WANDB_MODE=offline keeps one on disk)")
    return Writers(writers, log)


def read_log(path: Path) -> list[Row]:
    """The rows of a JSON Lines log in order of step, as the run that lived saw them.

    A step that goes back is a resume: what an abandoned branch wrote from there on is dropped. Rows of one step
    (training, validation) are joined. A torn last line is skipped; any other malformed line raises ``DataError``.
    """
    lines = path.read_bytes().split(b"\n")
    rows: list[Row] = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or torn
        try:
            row = {name: NON_FINITE.get(value, value) for name, value in json.loads(line).items()}
            step = row["step"]
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: not a row of a run's log ({error}); delete the line") from error
        while rows and rows[-1]["step"] > step:
            rows.pop()
        if rows and rows[-1]["step"] == step:
            rows[-1] |= row
        else:
            rows.append(row)
    return rows


def _json_value(value: Value) -> Value:
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
