"""Order, errors and deaths of the worker processes."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from megatron_aquila.data.workers import AHEAD, ordered_map
from megatron_aquila.errors import DataError


def act(item: int) -> int:
    """Items below 100 are squared, late ones first; the others misbehave."""
    if item == 100:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 101:
        os._exit(3)
    if item == 102:
        raise ZeroDivisionError("in a worker")
    time.sleep(0.02 if item % 2 == 0 else 0)
    return item * item


def test_results_in_order_and_bounded() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(20):
            taken.append(item)
            yield item

    results = ordered_map(act, items(), workers=2)
    for number in range(20):
        assert next(results) == number * number
        assert len(taken) <= number + 2 * AHEAD + 1, "the input is read no further ahead than promised"
    assert list(results) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_back(workers: int) -> None:
    with pytest.raises(ZeroDivisionError):
        list(ordered_map(act, [1, 102, 2], workers=workers))


@pytest.mark.parametrize(("item", "status"), [(100, "killed by SIGKILL"), (101, "exit status 3")])
def test_a_death_is_reported(item: int, status: str) -> None:
    with pytest.raises(DataError, match=rf"worker \d+ died, {status}.*fewer --workers; nothing was published"):
        list(ordered_map(act, [1, item, *range(20)], workers=2))
