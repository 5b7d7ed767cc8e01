"""Stale keys of a dead attempt must never be taken for this one's."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_aquila.train.rendezvous import agree_on_attempt

SOON = timedelta(seconds=20)


def attempt(store: dist.Store, world_size: int) -> list[str]:
    with ThreadPoolExecutor(world_size) as ranks:
        calls = [
            ranks.submit(agree_on_attempt, store, rank=rank, world_size=world_size, timeout=SOON)
            for rank in reversed(range(world_size))
        ]
        return [call.result() for call in calls]


def test_all_ranks_agree_and_each_attempt_differs_from_the_last() -> None:
    store = dist.HashStore()
    ids = [attempt(store, 4) for _ in range(3)]
    assert all(len(set(one)) == 1 for one in ids)
    assert len({one[0] for one in ids}) == 3


def test_an_attempt_that_broke_off_half_way_leaves_nothing_to_believe() -> None:
    store = dist.HashStore()
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] did not come"):
        agree_on_attempt(store, rank=0, world_size=3, timeout=timedelta(seconds=0.1))
    with pytest.raises(TimeoutError, match="rank 2 was not greeted"):
        agree_on_attempt(store, rank=2, world_size=3, timeout=timedelta(seconds=0.1))
    assert len(set(attempt(store, 3))) == 1


def test_a_world_of_one_agrees_with_itself() -> None:
    assert agree_on_attempt(dist.HashStore(), rank=0, world_size=1, timeout=SOON)
