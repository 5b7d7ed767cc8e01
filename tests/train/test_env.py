import mmap
import os
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

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


def test_nccls_groups_end_newest_first_and_the_world_last(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, destroy = [], dist.destroy_process_group
    with fake_world(0, 4):  # what the process group starts is replaced by what is up here
        for name in ("TCPStore", "PrefixStore", "init_process_group"):
            monkeypatch.setattr(dist, name, lambda *_args, **_settings: None)
        monkeypatch.setattr(env, "agree_on_attempt", lambda *_args, **_settings: "attempt")
        monkeypatch.setattr(dist, "destroy_process_group", lambda group: (ended.append(group), destroy(group)))
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", "1")
        with env.process_group(torch.device("cuda", 0), Launch(world_size=4), timedelta(seconds=5)):
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


def test_processes_share_a_gpu_through_gloo_alone() -> None:
    second = Launch(rank=1, local_rank=1, world_size=2, local_world_size=2)
    with mock.patch.object(torch, "cuda") as cuda:
        cuda.device_count.return_value = 1
        assert env.choose_device("cuda", second, "gloo") == torch.device("cuda", 0)
        with pytest.raises(AquilaError, match=r"shows 1; .* --distributed-backend gloo to let several share one"):
            env.choose_device("cuda", second)
        cuda.device_count.return_value = 0
        with pytest.raises(AquilaError, match=r"shows 0; start as many processes a node as it has GPUs, or use"):
            env.choose_device("cuda", second, "gloo")


@pytest.mark.parametrize(
    ("device", "backend", "asked"), [("cpu", "nccl", "gloo"), ("cuda:0", "nccl", "nccl"), ("cuda:0", "gloo", "gloo")]
)
def test_which_backend_carries(device: str, backend: env.Backend, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    where, launch = torch.device(device), Launch(rank=0, local_rank=0, world_size=2, local_world_size=2)
    with mock.patch.object(env, "dist") as dist, mock.patch.object(env, "agree_on_attempt", return_value="a"):
        with env.process_group(where, launch, timedelta(seconds=5), backend) as attempt:
            assert attempt == "a"
        ((given,), settings) = dist.init_process_group.call_args
    assert (given, settings["device_id"]) == (asked, where if asked == "nccl" else None)


NAMES = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "TORCH_NCCL_DUMP_ON_TIMEOUT",
    "TORCH_FR_BUFFER_SIZE",
    "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
)


def environment(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], **settings: Any) -> dict[str, str]:
    """What of ``NAMES`` is set after the preparation, where ``given`` was before."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    env.prepare_environment(**settings)
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_what_is_set_before_cuda_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    always = {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": "20000",
    }
    assert environment(monkeypatch, {}) == always
    assert environment(monkeypatch, {}, in_launch_order=True, traces=tmp_path) == always | {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/nccl_rank_",
    }


@pytest.mark.parametrize(
    "given",
    [
        {
            "CUDA_DEVICE_MAX_CONNECTIONS": "8",
            "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
            "TORCH_NCCL_TRACE_BUFFER_SIZE": "7",
            "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/elsewhere/",
        },
        {
            "CUDA_DEVICE_MAX_CONNECTIONS": "32",
            "PYTORCH_ALLOC_CONF": "",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            "TORCH_FR_BUFFER_SIZE": "0",
            "TORCH_FR_DUMP_TEMP_FILE": "/elsewhere/",
        },
    ],
    ids=["older names", "newer names"],
)
def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: dict[str, str]) -> None:
    assert environment(monkeypatch, given, in_launch_order=True, traces=tmp_path) == given


def test_torch_knows_the_names_of_the_flight_recorder() -> None:
    """It reads them in C++, and is silent about a name that it does not know."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
        for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
            assert library.find(name.encode()) > 0, name


def test_memory_is_that_of_this_process() -> None:
    assert 2**20 < env.memory_bytes(torch.device("cpu")) < 2**40


def test_an_error_of_one_rank_is_not_taken_for_one_of_all() -> None:
    """Only what every rank raises may be printed by one alone."""
    assert not AquilaError("one GPU too few").is_shared


def test_a_container_s_limit_is_the_machine_s_memory(tmp_path: Path) -> None:
    whole = env.machine_memory(tmp_path)
    assert whole == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    told, groups = tmp_path / "proc/self/cgroup", tmp_path / "sys/fs/cgroup"
    told.parent.mkdir(parents=True)
    (groups / "slice/job").mkdir(parents=True)
    (groups / "memory/docker").mkdir(parents=True)
    told.write_text("0::/slice/job\n")
    (groups / "slice/job/memory.max").write_text("max\n")
    assert env.machine_memory(tmp_path) == whole
    (groups / "slice/memory.max").write_text("4096\n")
    assert env.machine_memory(tmp_path) == 4096
    told.write_text("9:cpu:/elsewhere\n4:memory:/docker/of_another_namespace\n")
    (groups / "memory/memory.limit_in_bytes").write_text("8192\n")
    assert env.machine_memory(tmp_path) == 8192
    (groups / "memory/memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert env.machine_memory(tmp_path) == whole
