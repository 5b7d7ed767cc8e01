"""What is wrong with a run's inputs is told before anything is built; the plan, before that."""

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_aquila.config.cli import LoadedConfig
from megatron_aquila.config.derive import derive
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.config.settings import all_settings
from megatron_aquila.errors import CheckpointError
from megatron_aquila.observe.log import Log
from megatron_aquila.train import run as order
from megatron_aquila.train.build import Machine, create_context
from megatron_aquila.train.launcher import Launch, read_launch
from megatron_aquila.train.stops import StopRequest
from megatron_aquila.verify.pool import WorkerPool
from tests.train.runs import run, tiny_config
from tests.train.test_ephemeral import killed, on_nodes

Pools = Callable[[int], WorkerPool]
Change = Callable[[RunConfig, Path], RunConfig]


class Built(Exception):
    """The machine was built."""


def with_data(**given: Any) -> Change:
    return lambda config, folder: replace(
        config, data=replace(config.data, **{name: make(folder) for name, make in given.items()})
    )


def with_start(**given: Any) -> Change:
    return lambda config, folder: replace(
        config, checkpoint=replace(config.checkpoint, **{name: make(folder) for name, make in given.items()})
    )


def of_another_model(config: RunConfig, folder: Path) -> RunConfig:
    run(replace(config, train=replace(config.train, exit_samples=8)))
    wider = replace(config, model=replace(config.model, hidden_size=64))
    return with_start(load=lambda _: config.checkpoint.save, save=lambda _: folder / "other")(wider, folder)


WRONG: Mapping[str, tuple[Change, str]] = {
    "tokenizer": (
        with_data(
            vocab_file=lambda folder: folder / "vocab.jsn",
            merge_file=lambda folder: folder / "merges.txt",
            special_tokens_file=lambda folder: folder / "special_tokens.txt",
        ),
        "vocab.jsn",
    ),
    "data": (with_data(path=lambda folder: (str(folder / "treshe"),)), "treshe.idx"),
    "validation": (with_data(valid_sets=lambda folder: (f"zh={folder / 'zh'}",)), "zh.idx"),
    "checkpoint": (with_start(load=lambda folder: folder / "nowhere"), "nowhere: there is no such folder"),
    "published": (with_start(init_from_hf=lambda folder: folder / "hf"), "hf: there is no such folder"),
    "model": (of_another_model, "another model: hidden_size"),
}


def told_at_the_start(config: RunConfig) -> tuple[str, bool, str]:
    """What a rank prints before its machine would be built, and then raises; whether all ranks raise the same."""
    launch = read_launch() if torch.distributed.is_initialized() else Launch()
    derived, stream = derive(config, launch.world_size), io.StringIO()
    ctx = create_context(config, derived, torch.device("cpu"))
    loaded = LoadedConfig(config, dict.fromkeys(all_settings(), "default"))

    def build(*_: object) -> Machine:
        raise Built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "build_machine", build)
        try:
            order.train_in_folder(loaded, derived, ctx, launch, Log(stream=stream), StopRequest())
        except Built:
            return stream.getvalue(), False, "built"
        except CheckpointError as error:
            return stream.getvalue(), error.is_shared, str(error)
    raise AssertionError("a run without a machine")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_not_there_is_told_by_all_ranks_and_nothing_is_built(
    wrong: str, world: int, pool: Pools, tmp_path: Path
) -> None:
    change, message = WRONG[wrong]
    config = change(tiny_config(tmp_path), tmp_path)
    found = [told_at_the_start(config)] if world == 1 else pool(world).run(told_at_the_start, config)
    assert len({text for _, _, text in found}) == 1
    for printed, is_shared, text in found:
        assert message in text
        assert is_shared
        assert "memory, pp rank 0" in printed
        assert "kernels" not in printed


def test_the_plan_is_told_before_the_machine_is_built(tmp_path: Path) -> None:
    printed, _, text = told_at_the_start(tiny_config(tmp_path))
    assert text == "built"
    assert "memory, pp rank 0" in printed
    assert "pipeline bubble" in printed


def prepared(config: RunConfig) -> tuple[str, bool]:
    """The name of the checkpoint that a run goes on from, and whether it is the rank's part of an ephemeral one."""
    derived = derive(config, 1)
    ctx = create_context(config, derived, torch.device("cpu"))
    run = order.prepare(config, derived, ctx, Launch(), Log(stream=io.StringIO()))
    run.corpus.close()
    assert run.start.checkpoint is not None, "it would start afresh"
    return run.start.checkpoint.name, run.start.is_part


def test_parts_of_a_run_go_before_its_last_checkpoint_which_is_then_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    config = on_nodes(tiny_config(tmp_path), tmp_path)
    killed(config, 5)
    with monkeypatch.context() as patch:
        patch.setattr(order, "resolve_checkpoint", lambda *_: pytest.fail("the durable one was looked for"))
        assert prepared(config) == ("step_0000005", True)
    assert prepared(replace(config, checkpoint=replace(config.checkpoint, ephemeral_save_dir=None))) == (
        "step_0000003",
        False,
    )
