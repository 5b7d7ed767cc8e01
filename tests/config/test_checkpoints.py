from dataclasses import replace
from pathlib import Path

from megatron_aquila.config.checkpoints import check_ephemeral, check_exports
from megatron_aquila.config.saving import CheckpointConfig
from megatron_aquila.config.schema import RunConfig


def problems(**checkpoint: object) -> list[str]:
    config = replace(RunConfig(), checkpoint=CheckpointConfig(**checkpoint))  # type: ignore[arg-type]
    return [f"{found.flag} {found.value}: {found.why}; {found.way_out}" for found in check_exports(config, None)]


def test_releases_are_of_checkpoints() -> None:
    save = Path("run")
    assert problems(save=save) == []
    assert problems(save=save, save_interval=500, export_hf_every=1000) == []
    (folder,) = problems(save_interval=500, export_hf_every=1000)
    assert folder == "--export-hf-every 1000: checkpoints are what is released; give --save DIR with it"
    (interval,) = problems(save=save, save_interval=500, export_hf_every=700)
    assert "--save-interval is 500; use a multiple of 500" in interval


def ephemeral_problems(**checkpoint: object) -> list[str]:
    config = replace(RunConfig(), checkpoint=CheckpointConfig(**checkpoint))  # type: ignore[arg-type]
    return [f"{found.flag} {found.value}: {found.why}; {found.way_out}" for found in check_ephemeral(config, None)]


def test_ephemeral_checkpoints_lie_between_durable_ones_somewhere_else() -> None:
    whole = {"save": Path("run"), "save_interval": 500, "ephemeral_save_dir": "/dev/shm/x"}
    assert ephemeral_problems() == []
    assert ephemeral_problems(**whole, ephemeral_save_interval=499) == []
    (late,) = ephemeral_problems(**whole, ephemeral_save_interval=500)
    assert "none would come between two durable ones: --save-interval is 500; use less than 500" in late
    (alone,) = ephemeral_problems(**whole)
    assert "--ephemeral-save-dir /dev/shm/x: nothing is saved there; give --ephemeral-save-interval N" in alone
    nowhere, unsaved = ephemeral_problems(ephemeral_save_interval=10)
    assert "each node needs a place for them; give --ephemeral-save-dir with it" in nowhere
    assert "they lie between the durable checkpoints of a run; give --save DIR with it" in unsaved
