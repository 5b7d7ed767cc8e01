"""Who writes what is agreed once, and holds for every checkpoint of the run."""

from pathlib import Path

import pytest
import torch

from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.manifest import Manifest, TensorTable
from megatron_aquila.checkpoint.shares import Shares
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.errors import CheckpointError
from megatron_aquila.parallel.context import ParallelContext
from tests.checkpoint.numbers import numbers, save_checkpoint


def test_saves_with_shares_that_were_agreed_before_agree_on_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = ParallelContext.single()
    shares = Shares.agree([*numbers(1.0), Chunk("copy", (2,), (0,), torch.ones(2), replica=1)], ctx.host_world)
    assert shares.num_bytes == 4 * (6 + 4)
    save_checkpoint(tmp_path / "agreed", 1, numbers(2.0), {"value": {3: "三"}}, ctx)
    monkeypatch.setattr(Shares, "agree", lambda *args: pytest.fail("agreed again"))
    folder = save_checkpoint(tmp_path / "again", 1, numbers(2.0), {"value": {3: "三"}}, ctx, shares=shares)
    manifests = [(root / "step_0000001" / "manifest.json").read_text() for root in tmp_path.iterdir()]
    without_times = [[line for line in text.splitlines() if '"sa' not in line and '"sha' not in line]
                     for text in manifests]  # fmt: skip
    assert without_times[0] == without_times[1]
    assert CheckpointReader(folder).read("weight").tolist() == [2.0] * 6


def test_tensors_that_were_not_agreed_on_are_not_saved(tmp_path: Path) -> None:
    ctx = ParallelContext.single()
    shares = Shares.agree(numbers(1.0), ctx.host_world)
    other = [*numbers(1.0)[:1], Chunk("other", (2, 2), (0, 0), torch.ones(2, 2, dtype=torch.float64))]
    with pytest.raises(CheckpointError, match="rank 0 saves other tensors than were agreed"):
        save_checkpoint(tmp_path, 1, other, {}, ctx, shares=shares)
    assert not list(tmp_path.glob("step_*"))


def test_a_table_made_before_gives_the_text_of_one_made_at_once() -> None:
    shares = Shares.agree(numbers(1.0), ParallelContext.single().world)
    manifest = Manifest(step=7, state={"z": {2: 1}, "统": "一"}, files={}, tensors=shares.tensors, saved=1.5)
    assert manifest.render(shares.table) == manifest.render()
    with pytest.raises(AssertionError, match="zeta comes behind"):
        TensorTable({}).digest_with({"zeta": 1})
