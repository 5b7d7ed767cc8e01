from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_aquila.errors import AquilaError
from megatron_aquila.train import env
from megatron_aquila.train.launcher import Launch, read_launch
from megatron_aquila.verify.dry import fake_world


def test_the_launcher_tells_who_we_are(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    for value, name in enumerate(names, start=1):
        monkeypatch.setenv(name, str(value))
    assert read_launch() == Launch(rank=1, local_rank=2, world_size=3, local_world_size=4)


def test_without_a_launcher_the_world_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with env.process_group(torch.device("cpu"), read_launch(), timedelta(seconds=5)):
        assert not torch.distributed.is_initialized()


def test_groups_end_newest_first_and_the_world_last(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, destroy = [], dist.destroy_process_group
    with fake_world(0, 4):  # what the process group starts is replaced by what is up here
        for name in ("TCPStore", "PrefixStore", "init_process_group"):
            monkeypatch.setattr(dist, name, lambda *_args, **_settings: None)
        monkeypatch.setattr(env, "agree_on_attempt", lambda *_args, **_settings: "attempt")
        monkeypatch.setattr(dist, "destroy_process_group", lambda group: (ended.append(group), destroy(group)))
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", "1")
        with env.process_group(torch.device("cpu"), Launch(world_size=4), timedelta(seconds=5)):
            made = [dist.group.WORLD, dist.new_group([0, 1]), dist.new_group([0, 2])]
        assert ended == made[::-1]
        assert not dist.is_initialized()
        monkeypatch.undo()
        dist.init_process_group("fake", rank=0, world_size=1, store=dist.HashStore())  # for the fake world to end


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused_with_a_way_out() -> None:
    with pytest.raises(AquilaError, match="--device cpu"):
        env.choose_device("cuda", Launch())
    assert env.choose_device("auto", Launch()) == torch.device("cpu")


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    env.prepare_environment()
    assert env.os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    assert "PYTORCH_ALLOC_CONF" not in env.os.environ


def test_memory_is_that_of_this_process() -> None:
    assert 2**20 < env.memory_bytes(torch.device("cpu")) < 2**40


def test_an_error_of_one_rank_is_not_taken_for_one_of_all() -> None:
    """Only what every rank raises may be printed by one alone."""
    assert not AquilaError("one GPU too few").is_shared
