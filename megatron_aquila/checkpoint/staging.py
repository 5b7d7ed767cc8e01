"""Files that a thread writes from copies, while the tensors they were copied from are trained on.

The bytes of a file are copied into blocks of host memory in the order in which they lie in it, and a thread writes them
out. It begins once all is copied: hashing and writing meanwhile would take the cores and the memory's bandwidth that
the copy, for which training stands still, needs. Only where there is less memory than the file is long it begins when
no block is free; a written block is then filled again, and copying waits for the disk. The thread talks to no other
rank.
"""

import mmap
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

    Taken by ``prepare``, or when first needed, and kept for the next file: to touch or to pin memory costs more than to
    copy into it.
    """

    def __init__(self, device: torch.device, *, limit_bytes: int, block_bytes: int = BLOCK_BYTES) -> None:
        self._device = device
        self._is_pinned = device.type == "cuda"
        self._most = max(1, limit_bytes // block_bytes)
        self._block_bytes = block_bytes
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self._num_blocks = 0
        self._preparing: threading.Thread | None = None
        self.waited_seconds = 0.0
        """How long copying has waited for a block to be written, in all."""

    def prepare(self, num_bytes: int) -> None:
        """Begin to take memory for files of ``num_bytes`` in a thread; a file that comes before that is done waits.

        Returns at once. Memory that is not to be had then is asked for again when it is needed.
        """
        self._prepared()
        wanted = min(self._most, -(-num_bytes // self._block_bytes))
        self._preparing = threading.Thread(target=self._touch, args=(wanted,), name="takes memory", daemon=True)
        self._preparing.start()

    def write(self, path: Path, entries: Sequence[Entry]) -> "Future[FileRecord]":
        """Begin to write a safetensors file as ``write_tensors`` does; returns when its tensors are copied.

        On a GPU the copies are then in its current stream: what that does next may change the tensors. ``OSError`` and
        whatever else goes wrong in the thread is the future's.
        """
        self._prepared()
        header, ordered = header_and_order(entries)
        written: Future[FileRecord] = Future()
        arriving: queue.SimpleQueue[bytes | _Filled | None] = queue.SimpleQueue()
        arriving.put(header)
        writer = threading.Thread(
            target=self._write_out, args=(path, arriving, written), name=f"writes {path.name}", daemon=True
        )
        with closing(self._copies(ordered)) as copies:
            try:
                for filled in copies:
                    arriving.put(filled)
                    if writer.ident is None and self._num_blocks == self._most and self._free.empty():
                        writer.start()
            finally:
                arriving.put(None)  # or the thread would wait for ever
                if writer.ident is None:
                    writer.start()
        return written

    def _copies(self, entries: Sequence[Entry]) -> Generator[_Filled, None, None]:
        """One block after the other. A tensor that cannot be fetched leaves the block that it was to fill free."""
        block, filled = self._take(), 0
        try:
            for entry in entries:
                source = entry.fetch().view(torch.uint8)
                at = 0
                while at < len(source):
                    if filled == self._block_bytes:
                        yield self._filled(block, filled)
                        block, filled = self._take(), 0
                    size = min(len(source) - at, self._block_bytes - filled)
                    block[filled : filled + size].copy_(source[at : at + size], non_blocking=True)
                    at, filled = at + size, filled + size
        except Exception:
            self._free.put(block)
            raise
        yield self._filled(block, filled)

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
                return self._new_block()
        began = time.perf_counter()
        block = self._free.get()
        self.waited_seconds += time.perf_counter() - began
        return block

    def _new_block(self) -> Tensor:
        block = torch.empty(self._block_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)
        self._num_blocks += 1
        return block

    def _touch(self, wanted: int) -> None:
        """The thread that takes memory ahead."""
        if self._is_pinned:
            torch.cuda.set_device(self._device)  # a thread's own is the first, whose memory is another rank's
        try:
            while self._num_blocks < wanted:
                block = self._new_block()
                block[:: mmap.PAGESIZE] = 0
                self._free.put(block)
        except (MemoryError, RuntimeError):
            return

    def _prepared(self) -> None:
        """Wait until no memory is taken ahead: from there on blocks are counted by the caller's thread alone."""
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None

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
