"""One process stands for any rank of any world: real code on tensors without data, every byte and message counted.

A fake process group answers at once and moves nothing; tensors on the device ``meta`` have shapes and no values. What
the host reads of them is 1.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from megatron_aquila.config.derive import derive
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.kernels.blocks import BLOCKS_FLASH
from megatron_aquila.kernels.dispatch import choose_kernels
from megatron_aquila.kernels.documents import Documents
from megatron_aquila.parallel.batch import Batch
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.train.build import DTYPES, Machine, build_machine, create_context, run_kernel_sizes
from megatron_aquila.train.loss import LossSums
from megatron_aquila.train.step import agree, compute_gradients

META = torch.device("meta")


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """This process as ``rank`` of ``world_size``: collectives and messages are accepted and move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Call:
    """One collective or message: its kind, the global ranks that take part, and the bytes of the whole tensor.

    The whole tensor is what an all-gather returns, what a reduce-scatter takes, and what any other call takes. For a
    message ``ranks`` are the sender and the receiver.
    """

    kind: str
    ranks: tuple[int, ...]
    num_bytes: int


# The operations of torch's c10d that we use: our name, and which argument is the whole tensor.
_KINDS: Mapping[str, tuple[str, int]] = {
    "allreduce_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "alltoall_base_": ("all-to-all", 1),
    "send": ("send", 0),
    "recv_": ("receive", 0),
}


class CallRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """While active, every call of this process to any process group, in order, as ``calls``.

    Works on real groups, where the calls are made, and on fake ones, which get an empty tensor for one without data.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func.namespace != "c10d":
            return func(*args, **kwargs)
        self.calls.append(_call(func, args))
        return func(*tree_map_only(Tensor, _for_backend, args), **tree_map_only(Tensor, _for_backend, kwargs))


def _call(func: Any, args: tuple[Any, ...]) -> Call:
    name = func.overloadpacket.__name__
    assert name in _KINDS, f"c10d.{name} is not among the calls that are counted"
    kind, whole = _KINDS[name]
    tensor = next(iter(tree_iter(args[whole])))
    boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
    group = dist.ProcessGroup.unbox(boxed)
    ranks = tuple(dist.get_process_group_ranks(group))
    if kind in ("send", "receive"):
        me, peer = ranks[group.rank()], ranks[args[2]]
        ranks = (me, peer) if kind == "send" else (peer, me)
    return Call(kind, ranks, tensor.numel() * tensor.element_size())


def _for_backend(tensor: Tensor) -> Tensor:
    return torch.empty(0) if tensor.device.type == "meta" else tensor


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]  # as above
    """While active, the bytes of all living tensors on ``meta`` that were made or touched; 1 is what the host reads.

    ``live`` are the bytes now, ``peak`` the most there were. A storage counts once, however many views it has, and with
    the size that it has been given last.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.live = self.peak = 0
        self._known: dict[int, int] = {}  # bytes of each storage
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "StorageTracker":
        def resize_(storage: torch.UntypedStorage, num_bytes: int) -> Any:
            out = self._resize(storage, num_bytes)  # nothing of torch is told of it
            if storage._cdata in self._known:
                self._count(storage._cdata, num_bytes)
            return out

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]  # as above
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # as above
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device == META:
            return 1
        if func is torch.ops.aten._to_copy.default and args[0].device == META and _leaves_meta(kwargs):
            return torch.ones(args[0].shape, dtype=args[0].dtype)
        if func is torch.ops.aten.addmm.dtype_out and args[0].device == META:  # torch 2.11 has a wrong rule for it
            return kwargs["out"]
        out = func(*args, **kwargs)
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor) and leaf.device == META:
                self._meet(leaf.untyped_storage())
        if func is torch.ops.aten.logsumexp.default and args[0].device == META:
            self.peak = max(self.peak, self.live + args[0].nbytes)  # the exponentials, which its kernels have inside
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = 0
        self._count(key, storage.nbytes())
        weakref.finalize(storage, self._forget, key)

    def _count(self, key: int, num_bytes: int) -> None:
        self.live += num_bytes - self._known[key]
        self.peak = max(self.peak, self.live)
        self._known[key] = num_bytes

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)


def _leaves_meta(kwargs: Mapping[str, Any]) -> bool:
    return kwargs.get("device") is not None and torch.device(kwargs["device"]) != META


def flash_attention(q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None = None) -> Tensor:
    """Torch's flash kernel by name: on ``meta`` its front door takes the plain one, which would keep S x S scores."""
    assert documents is None, "documents do not change what is kept; leave them out of a dry run"
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBND, k_SBKD, v_SBKD))
    o_BNSD: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    return o_BNSD.permute(2, 0, 1, 3)


def dry_machine(config: RunConfig, world_size: int) -> Machine:
    """The machine of this process's place in a world of ``world_size``, on ``meta``."""
    derived = derive(config, world_size)
    ctx = create_context(config, derived, META)
    sizes = run_kernel_sizes(config, derived.shape, ctx)
    kernels = choose_kernels(META, DTYPES[config.train.precision], sizes=sizes)
    if not sizes.alters_scores:
        kernels = replace(kernels, attention=BLOCKS_FLASH if sizes.by_blocks else flash_attention)
    return build_machine(config, derived, ctx, kernels=kernels)


def dry_batch(shape: ModelShape, micro_batch: int, *, cp: int = 1) -> Batch:
    """A microbatch without data: one rank's tokens, where ``cp`` ranks share each sample."""
    tokens_BS = torch.empty(micro_batch, shape.seq_len // cp, dtype=torch.int64, device=META)
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=torch.empty_like(tokens_BS),
        loss_mask_BS=torch.empty_like(tokens_BS, dtype=torch.float32),
        positions_BS=torch.empty_like(tokens_BS),
        source_B=torch.empty(micro_batch, dtype=torch.int64, device=META),
    )


def dry_step(machine: Machine, batches: Sequence[Batch], source_names: Sequence[str] = ("data",)) -> None:
    """One step as ``train.step.train_step`` takes it, without a loader. Communicates over every group."""
    agree(machine.ctx, [])  # the call alone: in a fake world only this rank would count
    num_tokens = sum(batch.loss_mask_BS.numel() for batch in batches)
    has_z_loss = machine.derived.shape.max_z_loss > 0
    sums = LossSums(source_names, num_tokens=num_tokens, device=machine.ctx.device, has_z_loss=has_z_loss)
    compute_gradients(machine, batches, sums)
    machine.optimizer.step(machine.config.optim.lr, machine.optimizer.clip(machine.config.optim.clip_grad))
    sums.total(machine.ctx)
