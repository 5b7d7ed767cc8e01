"""A run whose replicas are no longer the same ends with the words and status of that, and publishes nothing since."""

from pathlib import Path
from typing import Any

import pytest

from megatron_aquila.commands import pretrain
from megatron_aquila.errors import DRIFTED, ReplicaError
from megatron_aquila.optim.distributed import DistributedOptimizer
from megatron_aquila.train.saving import Saver
from tests.train.runs import VOCAB_SIZE, run, tiny_config, write_corpus
from tests.train.test_faults import poisoned, set_train

MODEL = "--num-layers 1 --hidden-size 16 --num-heads 2 --ffn-size 16 --seq-len 16 --device cpu --precision fp32"
RUN = "--gbs 8 --train-samples 48 --eval-interval 0 --split 1 --check-replicas 2"


def drifts_at(check: int) -> Any:
    """``not_masters`` that names a tensor at one call, the first being 1."""
    calls: list[int] = []

    def not_masters(self: DistributedOptimizer) -> list[str]:
        calls.append(1)
        return ["model.norm.weight"] if len(calls) == check else []

    return not_masters


def test_it_ends_with_one_message_and_a_status_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(DistributedOptimizer, "not_masters", drifts_at(2))
    words = f"{MODEL} {RUN} --vocab-size {VOCAB_SIZE} --data-cache-path {tmp_path / 'cache'}".split()
    assert pretrain.main([*words, "--data-path", *write_corpus(tmp_path)]) == DRIFTED
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "error: replicas have drifted apart:\nmodel.norm.weight: the weights that rank 0 published are not" in error
    assert "at step 2 they were still the same: resume from a checkpoint of that step or before it" in error


def test_what_is_still_being_written_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistributedOptimizer, "not_masters", drifts_at(1))
    monkeypatch.setattr(Saver, "poll", lambda saver: None)
    with pytest.raises(ReplicaError, match="at step 0 they were still the same"):
        run(set_train(tiny_config(tmp_path), check_replicas=3))
    assert [path.name for path in (tmp_path / "run").glob("step_*[0-9]")] == [], "that of step 2 may hold the error"


def test_after_a_rewind_they_are_the_same_where_it_went_back_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DistributedOptimizer, "not_masters", drifts_at(2))
    monkeypatch.setattr(DistributedOptimizer, "clip", poisoned({4}, float("nan")))
    with pytest.raises(ReplicaError, match="at step 2 they were still the same"):
        run(set_train(tiny_config(tmp_path), check_replicas=3, on_nonfinite="rewind", eval_interval=0))
