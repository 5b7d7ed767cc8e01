"""A CUDA graph's stand-in on the CPU: records every operator with its very tensors, and runs them again.

It keeps to what a capture keeps to, and refuses what one refuses:

- recording does nothing: what the work has changed outside is put back, and what it has made is spoiled;
- a value that the host asks for, a shape that depends on values and a tensor made of the host's values raise;
- tensors from outside are found again by their memory, which must still be there;
- a replay runs operators and no line of the work's Python. Collectives are done before the next operator begins.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu}
WRITES = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer}
BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
NUMBER = "aten::lift_fresh"  # what assigning a number begins with; on a GPU a kernel's argument


class Outside:
    """A tensor that was there before: its place in memory that somebody else keeps."""

    def __init__(self, x: Tensor) -> None:
        self._memory = StorageWeakRef(x.untyped_storage())
        self._dtype, self._place = x.dtype, (x.storage_offset(), x.size(), x.stride())

    def find(self) -> Tensor:
        """The tensor, if its memory is still there."""
        memory = torch.UntypedStorage._new_with_weak_ptr(self._memory.cdata)
        if memory is None:
            raise RuntimeError(f"memory of a {self._dtype} {tuple(self._place[1])} that was recorded is gone")
        return torch.empty(0, dtype=self._dtype).set_(memory, *self._place)


class NoCopies(TorchFunctionMode):
    """Refuses what would copy values to the host or from it: a CPU's tensors are there, and no operator tells of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS | WRITES:
            raise RuntimeError(f"{func.__name__} needs the host while a step is recorded")
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """The operators of what runs inside, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._made: dict[int, Tensor] = {}  # by memory, which stays
        self._numbers: dict[int, Tensor] = {}
        self._before: dict[int, tuple[Tensor, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        by_mask = name == "aten::index" and any(x is not None and x.dtype is torch.bool for x in args[1])
        if by_mask or (name != "aten::index" and BY_VALUE & set(func.tags)):
            raise RuntimeError(f"{name} needs the host while a step is recorded")
        if name == NUMBER:
            self._numbers[memory(args[0])] = args[0]
        for x in written(func, args, kwargs):
            self._keep(x)
        out = func(*args, **kwargs)
        call = mapped(Tensor, self._named, (args, kwargs))
        inside = {memory(x) for x in tensors((args, kwargs))}
        self._made |= {memory(x): x for x in tensors(out) if memory(x) not in inside}
        self.calls.append((func, *call, mapped(Tensor, self._named, out)))
        return out

    def rewind(self) -> None:
        """As if nothing had been done."""
        for x, values in self._before.values():
            x.untyped_storage().copy_(values)
        for x in self._made.values():
            x.untyped_storage().fill_(0xFF)  # NaN in floats, -1 in whole numbers

    def play(self) -> None:
        """Do it all again, on the same memory."""
        with torch._C._AutoDispatchBelowAutograd():
            under_way: list[Any] = []
            for func, args, kwargs, out in self.calls:
                is_transfer = func._schema.name.startswith("c10d::")
                while under_way and not is_transfer:
                    under_way.pop(0).wait()
                args, kwargs, out = mapped(Outside, Outside.find, (args, kwargs, out))
                again = func(*args, **kwargs)
                for old, new in zip(tensors(out), tensors(again), strict=True):
                    if memory(old) != memory(new):
                        old.copy_(new)
                if is_transfer:
                    under_way.append(again[-1] if isinstance(again, tuple) else again)
            while under_way:
                under_way.pop(0).wait()

    def _named(self, x: Tensor) -> Tensor | Outside:
        return x if memory(x) in self._made or memory(x) in self._numbers else Outside(x)

    def _keep(self, x: Tensor) -> None:
        if memory(x) not in self._made and memory(x) not in self._before:
            self._before[memory(x)] = x, x.untyped_storage().clone()


class CpuCapture:
    """The ``Capture`` of a CPU."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def warm_up(self, work: Callable[[], None]) -> None:
        """At once."""
        work()

    def settle(self) -> None:
        """Nothing is under way."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """On a new tape."""
        tape = Tape()
        with NoCopies(), quiet_waits(), tape:
            work()
        tape.rewind()
        self.tapes.append(tape)
        return tape.play


@contextmanager
def quiet_waits() -> Iterator[None]:
    """Keep what gloo does at the end of a transfer, which a replay's own waiting does, from being recorded."""
    wait = dist.Work.wait

    def quietly(work: dist.Work) -> bool:
        with _disable_current_modes():
            return wait(work)

    with mock.patch.object(dist.Work, "wait", quietly):
        yield


def memory(x: Tensor) -> int:
    """What tells memory from other memory while it is there."""
    return x.untyped_storage()._cdata


def mapped(kind: type, change: Callable[[Any], Any], tree: Any) -> Any:
    """``tree`` with everything in it that is of a kind changed."""
    if isinstance(tree, kind):
        return change(tree)
    if type(tree) in (list, tuple):
        return type(tree)([mapped(kind, change, branch) for branch in tree])
    if type(tree) is dict:
        return {name: mapped(kind, change, branch) for name, branch in tree.items()}
    return tree


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in it."""
    found: list[Tensor] = []
    mapped(Tensor, found.append, tree)
    return found


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The operands that an operator changes; of a transfer any."""
    if func._schema.name.startswith("c10d::"):
        yield from tensors((args, kwargs))
        return
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors(args[place] if place < len(args) else kwargs.get(argument.name))
