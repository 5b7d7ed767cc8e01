"""A batch goes to the device whole, and nobody waits for it."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_aquila.kernels.documents import Documents
from megatron_aquila.parallel.batch import Batch


class Copies(TorchDispatchMode):
    """Keeps how every copy between devices was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.non_blocking: list[bool] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.non_blocking.append((kwargs or {}).get("non_blocking", False))
        return func(*args, **(kwargs or {}))


def batch() -> Batch:
    ids_BS = torch.zeros(2, 4, dtype=torch.int64)
    documents = Documents((0, 3, 8), torch.tensor([0, 3, 8], dtype=torch.int32))
    return Batch(
        tokens_BS=ids_BS,
        labels_BS=ids_BS + 1,
        loss_mask_BS=torch.ones(2, 4),
        positions_BS=ids_BS + 2,
        source_B=torch.zeros(2, dtype=torch.int64),
        documents=documents,
        microbatch=3,
    )


def test_every_tensor_goes_and_none_is_waited_for() -> None:
    host = batch()
    with Copies() as copies:
        moved = host.to(torch.device("meta"))
    tensors = [getattr(moved, field.name) for field in fields(Batch)]
    assert {x.device.type for x in tensors if isinstance(x, Tensor)} == {"meta"}
    assert moved.documents is not None
    assert moved.documents.bounds_device.device.type == "meta"
    assert moved.documents.bounds == (0, 3, 8), "kernels that count on the host read the host's"
    assert (moved.microbatch, moved.loss_weight) == (3, None)
    assert copies.non_blocking == [True] * 6


def test_on_the_host_nothing_is_copied() -> None:
    host = batch()
    stayed = host.to(torch.device("cpu"))
    assert stayed.tokens_BS is host.tokens_BS
    assert stayed.loss_mask_BS is host.loss_mask_BS
