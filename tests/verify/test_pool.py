import os
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from megatron_aquila.verify.pool import WorkerError, WorkerPool


def rank_and_sum(x: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    x = x * (dist.get_rank() + 1)
    dist.all_reduce(x)
    return dist.get_rank(), torch.get_num_threads(), x


def process_id() -> int:
    return os.getpid()


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"bad value on rank {rank}")
    dist.barrier()  # the other ranks wait for one that never comes


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def raise_while_another_computes() -> None:
    if dist.get_rank() == 0:
        raise ValueError("the cause")
    time.sleep(60)


def return_a_function() -> Callable[[], None]:
    return lambda: None


@pytest.fixture(scope="module")
def three() -> Iterator[WorkerPool]:
    with WorkerPool(3) as workers:
        yield workers


def test_results_come_back_by_rank(three: WorkerPool) -> None:
    results = three.run(rank_and_sum, torch.tensor([1.0, 2.0]))
    assert [(rank, threads) for rank, threads, _ in results] == [(0, 1), (1, 1), (2, 1)]
    assert all(torch.equal(total, torch.tensor([6.0, 12.0])) for _, _, total in results)


def test_workers_are_kept_from_call_to_call(three: WorkerPool) -> None:
    assert three.run(process_id) == three.run(process_id)


@pytest.mark.parametrize("rank", [0, 2])
def test_root_cause_is_first_and_consequences_last(three: WorkerPool, rank: int) -> None:
    with pytest.raises(WorkerError) as raised:
        three.run(raise_on, rank)
    first, *rest = str(raised.value).splitlines()
    assert first == f"raise_on failed on rank {rank} of 3:"
    assert f"ValueError: bad value on rank {rank}" in rest
    assert "raise ValueError" in str(raised.value), "no traceback of the cause"
    assert sorted(line[:7] for line in rest if line.startswith("rank ")) == sorted(
        f"rank {other}:" for other in range(3) if other != rank
    )
    assert len(three.run(process_id)) == 3, "the pool was not rebuilt"


def test_a_dying_rank_is_named(three: WorkerPool) -> None:
    with pytest.raises(WorkerError, match=r"die_on failed on rank 1 of 3:\nthe process died, exit code 7"):
        three.run(die_on, 1)
    assert len(three.run(process_id)) == 3


def test_a_timeout_names_the_late_rank(three: WorkerPool) -> None:
    before = three.run(process_id)
    with pytest.raises(WorkerError, match=r"sleep_on failed on rank 2 of 3:\nno answer within 0.3 s"):
        three.run(sleep_on, 2, timeout=0.3)
    assert not set(before) & set(three.run(process_id)), "stuck workers were kept"


def test_a_busy_rank_does_not_hide_the_cause(three: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_aquila.verify.pool.GRACE_SECONDS", 0.2)
    with pytest.raises(WorkerError, match="rank 1: still running when another rank failed") as raised:
        three.run(raise_while_another_computes)
    assert "ValueError: the cause" in str(raised.value)


def test_a_result_that_cannot_travel_is_an_error(three: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="pickle"):
        three.run(return_a_function)


def test_closing_ends_the_workers() -> None:
    workers = WorkerPool(1)
    (pid,) = workers.run(process_id)
    workers.close()
    workers.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(AssertionError, match="closed"):
        workers.run(process_id)
