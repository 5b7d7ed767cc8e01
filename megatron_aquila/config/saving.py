"""The settings of checkpoints, a section of ``config.schema``."""

# ruff: noqa: RUF009 -- setting() makes a dataclass field

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_aquila.config.fields import Count, Positive, setting

AUTO = Path("auto")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of the run and what it starts from."""

    save: Path | None = setting(None, "folder the checkpoints are written to", "--save")
    load: Path | None = setting(
        None, "folder (or one step of it) to resume from; it must exist. The word auto is --resume", "--load"
    )
    resume: bool = setting(
        False,
        "continue from the --save folder where it holds a checkpoint, else start as the other settings say",
        "--resume",
    )
    save_interval: Count = setting(1000, "steps between checkpoints", "--save-interval")
    rampup_save_interval: Count | None = setting(None, "steps between checkpoints while the batch ramps up")
    async_save: bool = setting(
        True, "train on while a checkpoint is written from a copy in host memory", "--async-save"
    )
    save_staging_gib: Positive = setting(4.0, "largest size of that copy on each rank; beyond it, training waits")
    keep: Count | None = setting(None, "checkpoints kept, the newest; default all", "--keep", "--most-recent-k")
    keep_every: Count | None = setting(None, "with --keep: checkpoints whose step is a multiple of this stay for ever")
    export_hf_every: Count | None = setting(None, "steps between checkpoints also published as SAVE/hf/step_N")
    ephemeral_save_interval: Count | None = setting(
        None,
        "steps between checkpoints on the nodes' own disks, of which the newest is kept",
        "--ephemeral-save-interval",
        "--non-persistent-save-interval",
    )
    ephemeral_save_dir: str | None = setting(
        None,
        "their folder, a local disk or /dev/shm; $VARIABLES are filled in on each rank",
        "--ephemeral-save-dir",
        "--non-persistent-local-ckpt-dir",
    )
    on_corrupt: Literal["fallback", "stop"] = setting(
        "fallback", "where the newest checkpoint of a folder is damaged: the last good one before it, or none"
    )
    init_from_hf: Path | None = setting(None, "published or converted weights to start from", "--init-from-hf")
    load_optim: bool = setting(True, "also load the optimizer and the position in the data", "--load-optim")
    override_data: bool = setting(
        False, "resume although data sets, weights, split or tokenizer differ from the checkpoint's", "--override-data"
    )
    override_rope: bool = setting(
        False, "start from weights that were trained with other rotary positions: to reach longer samples"
    )
    override_lr_schedule: bool = setting(
        False,
        "resume although the learning-rate schedule differs from the checkpoint's",
        "--override-lr-schedule",
        "--override-opt-param-scheduler",
    )

    @property
    def resumes_own(self) -> bool:
        """Whether the run goes on from what its own folder holds, if anything: ``--resume``, ``--load auto``."""
        return self.resume or self.load == AUTO
