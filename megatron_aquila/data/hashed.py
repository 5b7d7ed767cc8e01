"""A growing file and the hash of what is in it, so that nothing is read again to know it."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

from megatron_aquila.data.manifest import FileFacts

CHUNK: Final = 1 << 22  # bytes that are hashed at once


class HashedFile:
    """A file that is written from its first byte to its last, and the hash of all of it.

    ``size`` bytes are kept of what is there already, and hashed again. As a context it is closed at the end, or
    abandoned where something failed.

    Raises:
        OSError: from every method but ``abandon``.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path, self.size, self._digest = path, size, hashlib.sha256()
        self._file: BinaryIO = path.open("r+b" if size > 0 else "wb")
        try:
            self._file.truncate(size)
            left = size
            while left > 0 and (data := self._file.read(min(CHUNK, left))):
                self._digest.update(data)
                left -= len(data)
        except OSError:
            self.abandon()
            raise

    def write(self, data: Any) -> None:
        """Append bytes or an array's memory."""
        self._file.write(data)
        self._digest.update(data)
        self.size += memoryview(data).nbytes

    def flush(self) -> None:
        """Hand everything to the system."""
        self._file.flush()

    def close(self) -> None:
        """Everything is on the disk then."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def abandon(self) -> None:
        """Let go of the file as it is."""
        with suppress(OSError):  # what could not be flushed to a full disk is given up
            self._file.close()

    def facts(self) -> FileFacts:
        """Size and hash so far."""
        return FileFacts(size=self.size, sha256=self._digest.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()
