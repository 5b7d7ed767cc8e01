"""With sharded weights a rank never holds them all: not while it is built, filled or checked, nor when it ends."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch

from megatron_aquila.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.optim.distributed import DistributedOptimizer
from megatron_aquila.optim.gathering import MOST_WHOLE
from megatron_aquila.parallel import sanity
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.parallel.sanity import check_replicated
from megatron_aquila.train.build import Machine
from megatron_aquila.train.resume import initialize
from megatron_aquila.verify.dry import StorageTracker, dry_machine, fake_world

WORLD, RANK = 64, 5
CONFIG = RunConfig(
    model=ModelConfig(num_layers=6, hidden_size=128, num_heads=4, seq_len=64, vocab_size=512),
    parallel=ParallelConfig(zero=3, bucket_mib=1 / 64),
    train=TrainConfig(global_batch=64),
)


def bytes_of_weights(config: RunConfig) -> int:
    with fake_world(RANK, WORLD), StorageTracker():
        return sum(info.param.nbytes for info in dry_machine(config, WORLD).infos)


@contextmanager
def built(config: RunConfig) -> Iterator[tuple[Machine, StorageTracker]]:
    with fake_world(RANK, WORLD), StorageTracker() as storages:
        machine = dry_machine(config, WORLD)
        machine.optimizer.settle()
        yield machine, storages


def peaks(config: RunConfig) -> dict[str, int]:
    """Bytes beside what is kept, at most, of each of these."""
    found = {}
    with built(config) as (machine, storages):
        static = storages.live
        found["build"] = storages.peak - static

        def during(name: str, act: Callable[[], object]) -> None:
            storages.peak = storages.live
            act()
            found[name] = storages.peak - static

        def check() -> None:
            with mock.patch.object(sanity, "_differ", return_value=torch.tensor(False)):  # a fake world has no others
                check_replicated(machine.infos, machine.ctx, read=lambda one: machine.optimizer.wait_for_weights([one]))

        during("load", lambda: initialize(machine))
        during("check", check)
        machine.optimizer.settle()
        assert storages.live - static < 1024, "all that was gathered is let go of"
    return found


def test_a_rank_holds_its_shards_and_a_bucket_while_it_starts_and_ends() -> None:
    found = peaks(CONFIG)
    largest = 512 * 128  # elements of embedding and head, each a bucket
    assert found["build"] <= 1.05 * 8 * largest, "a bucket's weights and gradient sums, and the parameter itself"
    assert found["load"] <= 4 * largest / WORLD, "a rectangle that is drawn"
    assert found["check"] <= MOST_WHOLE * 2 * largest + 2**20 // 4, "buckets that are whole, and sums of a block"
    assert max(found.values()) < bytes_of_weights(CONFIG) / 2


def test_parameters_with_memory_of_their_own_would_show() -> None:
    right, weight = peaks(CONFIG)["build"], Placement.weight

    def with_memory(self: Placement, *shape: int) -> torch.nn.Parameter:
        return weight(replace(self, has_memory=True), *shape)

    with mock.patch.object(Placement, "weight", with_memory):
        assert peaks(CONFIG)["build"] > right + bytes_of_weights(CONFIG) / 2


def test_gathering_all_to_fill_it_would_show() -> None:
    right, settle = peaks(CONFIG)["load"], DistributedOptimizer.settle

    def gather_all(self: DistributedOptimizer) -> None:
        settle(self)
        for bucket in self._buckets:
            bucket.begin_gather()
            bucket.finish_publish()

    with mock.patch.object(DistributedOptimizer, "kept_weights", lambda self: gather_all(self) or []):
        assert peaks(CONFIG)["load"] > right + bytes_of_weights(CONFIG) / 2
