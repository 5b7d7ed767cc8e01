"""The settings of what is written about a run, a section of ``config.schema``."""

# ruff: noqa: RUF009 -- setting() makes a dataclass field

from dataclasses import dataclass
from pathlib import Path

from megatron_aquila.config.fields import Count, Positive, Whole, setting


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    """What is written about the run, and where."""

    log_interval: Count = setting(1, "steps between lines of the log", "--log-interval")
    log_dir: Path | None = setting(None, "folder of log.jsonl; default the save folder", "--log-dir")
    tensorboard_dir: Path | None = setting(None, "folder of TensorBoard events", "--tensorboard-dir")
    wandb_project: str | None = setting(
        None,
        "Weights & Biases project; megatron_aquila where only --wandb-dir is given. Offline unless WANDB_MODE is set",
    )
    wandb_exp_name: str | None = setting(None, "name of the Weights & Biases run; default one that it thinks up")
    wandb_dir: Path | None = setting(None, "folder of the Weights & Biases run", "--wandb-dir", "--wandb-save-dir")
    peak_tflops: Positive | None = setting(
        None, "dense peak of the device for MFU; default from its name", "--peak-tflops"
    )
    profile_steps: str | None = setting(
        None, "steps FIRST-LAST, both included, to profile: a trace in the log's folder and a summary of it"
    )
    profile_ranks: tuple[Whole, ...] = setting((0,), "ranks that are profiled", "--profile-ranks")
    breadcrumbs: bool = setting(
        True, "keep every rank's last transfers in the log's folder, for aquila doctor hang", "--breadcrumbs"
    )
    hang_dump_seconds: Positive = setting(120.0, "a rank without a transfer for so long writes its Python stack there")
    straggler_interval: Whole = setting(100, "steps between looks for slow ranks; 0 means never")
