from dataclasses import replace
from pathlib import Path

from megatron_aquila.config.checkpoints import check_exports
from megatron_aquila.config.schema import CheckpointConfig, RunConfig


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
