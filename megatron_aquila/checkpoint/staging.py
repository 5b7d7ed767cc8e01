"""Files that a thread writes from copies, while the tensors they were copied from are trained on.

The bytes of a file are copied into blocks of host memory in the order in which they lie in it, a thread writes them
out, and a written block is filled again. With less memory than the file is long, copying waits for the disk, and
nothing else changes. The thread talks to no other rank.
"""

import queue
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_aquila.checkpoint.tensorfile import Entry, FileRecord, header_and_order, write_stream, write_tensors

BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class _Filled:
    """The first ``size`` bytes of a block; on a GPU they are there once ``copied`` has come."""

    block: Tensor
    size: int
    copied: torch.cuda.Event | None


class Staging:
    """At most ``limit_bytes`` of host memory, pinned where tensors come from a GPU, in blocks of ``block_bytes``.

    Taken when first needed and kept for the next file: to touch or to pin memory costs more than to copy into it.
    """

    def __init__(self, device: torch.device, *, limit_bytes: int, block_bytes: int = BLOCK_BYTES) -> None:
        self._is_pinned = device.type == "cuda"
        self._most = max(1, limit_bytes // block_bytes)
        self._block_bytes = block_bytes
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self._num_blocks = 0
        self.waited_seconds = 0.0
        """How long copying has waited for a block to be written, in all."""

    def write(self, path: Path, entries: Sequence[Entry]) -> "Future[FileRecord]":
        """Begin to write a safetensors file as ``write_tensors`` does; returns when its tensors are copied.

        On a GPU the copies are then in its current stream: what that does next may change the tensors. ``OSError`` and
        whatever else goes wrong in the thread is the future's.
        """
        header, ordered = header_and_order(entries)
        written: Future[FileRecord] = Future()
        arriving: queue.SimpleQueue[bytes | _Filled | None] = queue.SimpleQueue()
        arriving.put(header)
        threading.Thread(
            target=self._write_out, args=(path, arriving, written), name=f"writes {path.name}", daemon=True
        ).start()
        try:
            self._copy_out(ordered, arriving)
        finally:
            arriving.put(None)  # or the thread would wait for ever
        return written

    def _copy_out(self, entries: Sequence[Entry], arriving: "queue.SimpleQueue[bytes | _Filled | None]") -> None:
        block, filled = self._take(), 0
        for entry in entries:
            source = entry.fetch().view(torch.uint8)
            at = 0
            while at < len(source):
                if filled == self._block_bytes:
                    arriving.put(self._filled(block, filled))
                    block, filled = self._take(), 0
                size = min(len(source) - at, self._block_bytes - filled)
                block[filled : filled + size].copy_(source[at : at + size], non_blocking=True)
                at, filled = at + size, filled + size
        arriving.put(self._filled(block, filled))

    def _filled(self, block: Tensor, size: int) -> _Filled:
        copied = None
        if self._is_pinned:
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch has no types for it
            copied.record()
        return _Filled(block, size, copied)

    def _take(self) -> Tensor:
        """A block that is free; a further one as long as the limit allows; else the next that is written."""
        try:
            return self._free.get_nowait()
        except queue.Empty:
            if self._num_blocks < self._most:
                self._num_blocks += 1
                return torch.empty(self._block_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)
        began = time.perf_counter()
        block = self._free.get()
        self.waited_seconds += time.perf_counter() - began
        return block

    def _write_out(
        self, path: Path, arriving: "queue.SimpleQueue[bytes | _Filled | None]", written: "Future[FileRecord]"
    ) -> None:
        """The thread. After an error it goes on taking blocks, so that who fills them never waits in vain."""
        try:
            with closing(self._blocks(arriving)) as blocks:
                record = write_stream(path, blocks)
        except BaseException as error:
            written.set_exception(error)
            while (filled := arriving.get()) is not None:  # its copy is not awaited: nothing of it is written
                if not isinstance(filled, bytes):
                    self._free.put(filled.block)
        else:
            written.set_result(record)

    def _blocks(self, arriving: "queue.SimpleQueue[bytes | _Filled | None]") -> Generator[memoryview, None, None]:
        while (filled := arriving.get()) is not None:
            if isinstance(filled, bytes):
                yield memoryview(filled)
                continue
            try:
                if filled.copied is not None:
                    filled.copied.synchronize()
                yield filled.block[: filled.size].numpy().data
            finally:
                self._free.put(filled.block)
        arriving.put(None)  # whoever asks once more finds the end again


def write_at_once(path: Path, entries: Sequence[Entry]) -> "Future[FileRecord]":
    """``Staging.write`` without a thread and without copies: all is written on return."""
    written: Future[FileRecord] = Future()
    try:
        written.set_result(write_tensors(path, entries))
    except Exception as error:
        written.set_exception(error)
    return written
