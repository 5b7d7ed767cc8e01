"""The process's surroundings: device, environment variables, process group. The one place that touches them."""

import os
import resource
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world  # torch lists its groups nowhere else

from megatron_aquila.errors import AquilaError
from megatron_aquila.train.launcher import Launch
from megatron_aquila.train.rendezvous import agree_on_attempt

Backend = Literal["nccl", "gloo"]  # of what travels between GPUs
TRACE_ENTRIES = 20_000  # collectives that NCCL's flight recorder holds; torch's 2,000 are less than a step of the 34B
TRACE_PREFIX = "nccl_rank_"  # torch appends the rank


def prepare_environment(*, in_launch_order: bool = False, traces: Path | None = None) -> None:
    """Set what must stand before CUDA and NCCL start; what the user set stays.

    ``in_launch_order``: for layers split over tp or cp. One hardware queue keeps kernels in the order of their launch,
    so that a collective launched before a matrix product also starts before it (on Ampere and Hopper). Where weights
    are gathered on streams of their own, as with ZeRO 3, one queue would make them wait for products that do not need
    them. ``traces``: the folder in which each rank writes NCCL's last collectives once one of them has timed out.
    """
    if in_launch_order:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # older names, which torch still reads, but after the new ones
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(TRACE_ENTRIES))
    if traces is not None and "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in os.environ:
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(traces.absolute() / TRACE_PREFIX))


def choose_device(wanted: Literal["auto", "cpu", "cuda"], launch: Launch, backend: Backend = "nccl") -> torch.device:
    """The device this process computes on; ``auto`` takes a GPU where there is one, ``backend`` gloo one of others'.

    On the CPU several ranks share the cores: more threads than cores slow each other down thirtyfold. Raises
    ``AquilaError`` where this rank has no GPU, or with NCCL none of its own.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    if kind == "cpu":
        share = (os.cpu_count() or 1) // launch.local_world_size
        torch.set_num_threads(max(1, min(torch.get_num_threads(), share)))
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    if num_devices == 0 or (num_devices <= launch.local_rank and backend == "nccl"):
        or_share = ", --distributed-backend gloo to let several share one" if num_devices > 0 else ""
        raise AquilaError(
            f"--device {wanted}: local rank {launch.local_rank} has no GPU: this node shows {num_devices}; start as "
            f"many processes a node as it has GPUs{or_share}, or use --device cpu"
        )
    device = torch.device("cuda", launch.local_rank % num_devices)
    torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(device: torch.device, launch: Launch, timeout: timedelta, backend: Backend = "nccl") -> Iterator[str]:
    """The default process group for the length of a run, nothing in a world of one; and the attempt's id.

    Between CPUs it is gloo's, whatever the ``backend``.

    The store's keys carry the attempt's id: after a restart torchrun's store still holds the dead processes'
    addresses, and a rank that reads them never connects.
    """
    if launch.world_size == 1:
        yield uuid.uuid4().hex
        return
    agent_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    tcp = dist.TCPStore(  # type: ignore[attr-defined]  # torch re-exports it without saying so
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        launch.world_size,
        is_master=launch.rank == 0 and not agent_hosts,
        timeout=timeout,
    )
    attempt = agree_on_attempt(tcp, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
    is_nccl = device.type == "cuda" and backend == "nccl"
    dist.init_process_group(
        "nccl" if is_nccl else "gloo",
        store=dist.PrefixStore(f"attempt_{attempt}", tcp),  # type: ignore[attr-defined]  # as above
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
        device_id=device if is_nccl else None,
    )
    yield attempt
    # Not after an error: with a dead neighbour it can wait for ever. Newest first, an order that all ranks share: NCCL
    # may wait for a group's other ranks, and torch goes by names, those of split groups being hashes of their ranks.
    # gloo's are ended at once: one by one, its threads can outlive what they work on, and abort the process.
    for group in reversed([*_world.pg_map]) if is_nccl else [None]:
        dist.destroy_process_group(group)


def memory_bytes(device: torch.device) -> int:
    """Peak bytes this process has held: of the GPU's allocator, or of resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes that the processes of this machine may hold together: all its memory, or what its container is given.

    ``root`` is that of the file system, in which Linux tells of containers.
    """
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_container_limits(root)])


def _container_limits(root: Path) -> Iterator[int]:
    """The limits of the control groups that this process is in, from its own to the outermost that can be seen."""
    told = root / "proc/self/cgroup"
    for line in told.read_text().splitlines() if told.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / "sys/fs/cgroup" / controllers  # the older kind has a tree for each controller
        group = base / path.lstrip("/")
        for folder in (group, *(above for above in group.parents if above.is_relative_to(base))):
            file = folder / ("memory.limit_in_bytes" if controllers else "memory.max")
            limit = file.read_text().strip() if file.is_file() else ""
            if limit.isdecimal():  # "max" is none
                yield int(limit)
