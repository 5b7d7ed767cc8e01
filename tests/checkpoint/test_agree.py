from collections.abc import Callable

import pytest
import torch

from megatron_aquila.checkpoint.agree import together
from megatron_aquila.errors import CheckpointError
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.verify.pool import WorkerPool

CPU = torch.device("cpu")


def worker(failing: tuple[int, ...]) -> object:
    ctx = ParallelContext.create(RankGrid(dp=2), CPU)

    def action() -> int:
        if ctx.rank in failing:
            raise OSError(28, "No space left on device", "/some/file")
        return 10 * ctx.rank

    try:
        return together(action, ctx.world)
    except CheckpointError as error:
        return str(error)


def test_every_rank_hears_of_every_failure(pool: Callable[[int], WorkerPool]) -> None:
    assert pool(2).run(worker, ()) == [[0, 10]] * 2
    reason = "[Errno 28] No space left on device: '/some/file'"
    assert pool(2).run(worker, (1,)) == [f"{reason} (rank 1)"] * 2
    assert pool(2).run(worker, (0, 1)) == [f"{reason} (rank 0, 1)"] * 2


def test_a_reason_without_words_is_named() -> None:
    def action() -> None:
        raise MemoryError

    with pytest.raises(CheckpointError, match=r"^MemoryError$"):
        together(action, ParallelContext.single().world)
