"""Shards joined in their order into data sets, under names that appear when all is written; and where to go on.

``PREFIX.partial/`` holds shards that wait for their turn, one growing file a stream, and ``journal.jsonl``: the plan,
then a line for each shard that was appended. A killed run is continued from there; the folder goes when all is done.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from pydantic import TypeAdapter

from megatron_aquila.data.indexed import CODE_OF_DTYPE, HEADER, MAGIC, VERSION
from megatron_aquila.data.manifest import (
    Contents,
    FileFacts,
    Manifest,
    Origin,
    remove_manifest,
    write_manifest,
)
from megatron_aquila.data.shards import Counts, Shard, shard_folder
from megatron_aquila.errors import ConfigError, DataError, Problem

MANIFEST: Final = TypeAdapter(Manifest)
CHUNK: Final = 1 << 22  # bytes that are copied and hashed at once
BLOCK: Final = 1 << 19  # documents whose part of the index is made at once
PATIENCE: Final = 10.0  # seconds in which the workers of a killed run are gone


class HashedFile:
    """A file that is written from its first byte to its last, and the hash of all of it.

    ``size`` bytes are kept of what is there already, and hashed again.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path, self.size, self._digest = path, size, hashlib.sha256()
        self._file: BinaryIO = path.open("r+b" if size > 0 else "wb")
        self._file.truncate(size)
        left = size
        while left > 0 and (data := self._file.read(min(CHUNK, left))):
            self._digest.update(data)
            left -= len(data)

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
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Let go of the file as it is."""
        with suppress(OSError):  # what could not be flushed to a full disk is given up
            self._file.close()

    def facts(self) -> FileFacts:
        """Size and hash so far."""
        return FileFacts(size=self.size, sha256=self._digest.copy().hexdigest())


class Output:
    """The growing data sets of ``prefix`` and the journal of what is in them.

    ``names`` are the data sets' keys, ``streams`` the files of a shard, ``plan`` what must be the same for a run to go
    on where another stopped.

    Attributes:
        num_shards: appended so far, by this run and those it continues.
        counts: what they hold.

    Raises:
        ConfigError: what was begun here has another plan, or a data set is there already; ``overwrite`` goes on anew.
        DataError: another process is at it, a file cannot be written, or the growing files were changed.
    """

    def __init__(
        self,
        prefix: str,
        *,
        names: Sequence[str],
        streams: Sequence[str],
        dtype: np.dtype[Any],
        plan: Mapping[str, Any],
        overwrite: bool,
    ) -> None:
        self.prefix, self.names, self.dtype = prefix, tuple(names), dtype
        self.folder = Path(f"{prefix}.partial")
        self.num_shards, self.counts, self.largest = 0, Counts(), [-1] * len(self.names)
        self._plan = json.loads(json.dumps(plan))
        self._files: dict[str, HashedFile] = {}
        self._digests: dict[str, str] = {}
        self._manifests: dict[str, Any] | None = None  # those of a run that was killed while it published
        self._extra: list[str] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._journal = (self.folder / "journal.jsonl").open("a+", encoding="utf-8")
            self._lock()
            ends = self._resume(overwrite=overwrite)
            if self._manifests is None:
                self._files = {name: HashedFile(self.folder / name, ends.get(name, 0)) for name in streams}
                self._check_ends(ends)
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written: {error.strerror}") from error

    def _lock(self) -> None:
        """Workers of a killed run hold the lock until they notice."""
        patience = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > patience:
                    raise DataError(f"{self.folder}: another process is writing it; wait for its end") from None
                time.sleep(0.05)

    def _resume(self, *, overwrite: bool) -> dict[str, int]:
        """Read the journal; returns how long each stream was when its last line was written."""
        self._journal.seek(0)
        lines = [json.loads(line) for line in self._journal if line.endswith("\n")]  # the last may be cut off
        differing = [key for key in self._plan if lines and lines[0].get(key) != self._plan[key]]
        is_resumable = self._plan["is_resumable"]
        if differing and not overwrite and (is_resumable or lines[0].get("is_resumable")):
            why = f"{self.folder} holds an unfinished run with other {', '.join(differing)}"
            way_out = "give the same settings to go on, --overwrite to begin anew, or another prefix"
            raise ConfigError([Problem("--output-prefix", self.prefix, why, way_out)])
        goes_on = bool(lines) and not differing and is_resumable
        self._manifests = lines[-1].get("manifests") if goes_on else None
        if self._manifests is None:
            self._refuse_existing(overwrite=overwrite, begun=bool(lines))
        if not goes_on:
            self._begin()
            return {}
        for path in self.folder.iterdir():
            if path.is_dir() and "." in path.name:  # of a worker that died
                shutil.rmtree(path)
        self._journal.truncate(sum(len(json.dumps(line)) + 1 for line in lines))
        self._extra = lines[-1].get("extra", [])
        shards = [line for line in lines[1:] if "index" in line]
        for line in shards:
            self._add(Shard(line["index"], Counts(**line["counts"]), tuple(line["largest"])))
        self._digests = shards[-1]["digests"] if shards else {}
        ends: dict[str, int] = shards[-1]["ends"] if shards else {}
        return ends

    def _refuse_existing(self, *, overwrite: bool, begun: bool) -> None:
        """Also of a run that was begun when nothing was there; its folder stays."""
        paths = [Path(f"{self.document_prefix(name)}.{end}") for name in self.names for end in ("bin", "idx")]
        existing = [path for path in (*paths, *self._extra_paths().values()) if path.exists()]
        if existing and not overwrite:
            if not begun:
                shutil.rmtree(self.folder)
            why = f"{existing[0]} is there already"
            way_out = "give --overwrite to replace it when the new one is whole, or another prefix"
            raise ConfigError([Problem("--output-prefix", self.prefix, why, way_out)])

    def _begin(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        self._journal.truncate(0)
        self._write_line(self._plan)

    def _check_ends(self, ends: Mapping[str, int]) -> None:
        """What lies there must be what was written."""
        for name in ends:
            found = self._files[name].facts().sha256
            if found != self._digests[name]:
                raise DataError(f"{self.folder / name}: was changed since it was written; remove it all to begin anew")

    def document_prefix(self, name: str) -> str:
        """A data set's prefix, as Megatron-LM names it."""
        return f"{self.prefix}_{name}_document"

    def append(self, shard: Shard) -> None:
        """Move a shard to the end of the streams; the next one must be the next number.

        Raises:
            DataError: a file cannot be read or written, as on a full disk; what was appended before stays.
        """
        assert shard.index == self.num_shards, f"shard {shard.index} after {self.num_shards} others"
        source = shard_folder(self.folder, shard.index)
        try:
            for name, file in self._files.items():
                with (source / name).open("rb") as stream:
                    while data := stream.read(CHUNK):
                        file.write(data)
                file.flush()
            self._add(shard)
            ends = {name: file.size for name, file in self._files.items()}
            digests = {name: file.facts().sha256 for name, file in self._files.items()}
            self._write_line({**asdict(shard), "ends": ends, "digests": digests})
            shutil.rmtree(source)
        except OSError as error:
            raise DataError(
                f"{self.folder}: cannot be written: {error.strerror}; what was finished is kept: make room, and the "
                "same command goes on from there"
            ) from error

    def finish(self, origin: Origin) -> dict[str, Manifest]:
        """Write the indices, then give everything its name, the manifests last; returns them by key.

        Raises:
            DataError: a file cannot be written; the same command goes on from there.
        """
        try:
            if self._manifests is None:
                made = {name: self._manifest(name, largest, origin) for name, largest in self._largest()}
                for file in self._files.values():
                    file.close()
                self._manifests = {name: asdict(manifest) for name, manifest in made.items()}
                self._extra = [name for name in self._extra_paths() if name in self._files and self._files[name].size]
                self._write_line({"manifests": self._manifests, "extra": self._extra})
            self._publish(self._extra)
        except OSError as error:
            raise DataError(f"{self.prefix}: cannot be written: {error.strerror}; the same command goes on") from error
        manifests = {name: MANIFEST.validate_json(json.dumps(manifest)) for name, manifest in self._manifests.items()}
        for name, manifest in manifests.items():
            write_manifest(self.document_prefix(name), manifest)
        shutil.rmtree(self.folder)
        return manifests

    def _publish(self, extra: Sequence[str]) -> None:
        """Give the files their names; may be done again after it was killed half-way."""
        for name, path in self._extra_paths().items():
            if name not in extra:
                path.unlink(missing_ok=True)  # of the data set that is replaced
            elif (self.folder / name).exists():
                (self.folder / name).replace(path)
        for name in self.names:
            prefix = self.document_prefix(name)
            bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
            index, tokens = self.folder / f"{name}.idx", self.folder / f"{name}.bin"
            if index.exists():
                remove_manifest(prefix)
                idx_path.unlink(missing_ok=True)
                bin_path.unlink(missing_ok=True)
                index.replace(idx_path)
            if tokens.exists():
                tokens.replace(bin_path)

    def _extra_paths(self) -> dict[str, Path]:
        return {name: Path(f"{self.prefix}.{name}") for name in ("meta.jsonl", "bad.jsonl")}

    def close(self) -> None:
        """Let go of the folder; nothing is kept of it where no shard was finished."""
        self._journal.close()
        for file in self._files.values():
            file.abandon()
        if self.num_shards == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _largest(self) -> list[tuple[str, int]]:
        return list(zip(self.names, self.largest, strict=True))

    def _manifest(self, name: str, largest: int, origin: Origin) -> Manifest:
        tokens = self._files[f"{name}.bin"].facts()
        self._files[f"{name}.lengths"].flush()
        index = HashedFile(self.folder / f"{name}.idx")
        sequences = write_index(index, self.folder / f"{name}.lengths", self.dtype)
        index.close()
        contents = Contents(
            documents=self._files[f"{name}.lengths"].size // 4,
            sequences=sequences,
            tokens=tokens.size // self.dtype.itemsize,
            dtype=self.dtype.name,
            largest_token=None if largest < 0 else largest,
            bin=tokens,
            idx=index.facts(),
        )
        return Manifest(contents=contents, origin=origin)

    def _add(self, shard: Shard) -> None:
        self.num_shards += 1
        self.counts += shard.counts
        self.largest = list(map(max, self.largest, shard.largest))

    def _write_line(self, line: Mapping[str, Any]) -> None:
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()


def write_index(file: HashedFile, lengths_path: Path, dtype: np.dtype[Any]) -> int:
    """The index of documents of one sequence each, from their lengths (int32; 0 for one of none); how many sequences.

    Raises:
        OSError: a file cannot be read or written.
    """
    empty = lengths_path.stat().st_size == 0  # which cannot be mapped
    blocks: Any = np.empty(0, "<i4") if empty else np.memmap(lengths_path, dtype="<i4", mode="r")
    starts = range(0, len(blocks), BLOCK)
    sequences = sum(int(np.count_nonzero(blocks[start : start + BLOCK])) for start in starts)
    file.write(MAGIC + HEADER.pack(VERSION, CODE_OF_DTYPE[dtype], sequences, len(blocks) + 1))
    for start in starts:
        lengths = blocks[start : start + BLOCK]
        file.write(lengths[lengths > 0].data)
    offset = 0
    for start in starts:
        lengths = blocks[start : start + BLOCK]
        ends = offset + np.cumsum(lengths[lengths > 0], dtype=np.int64) * dtype.itemsize
        file.write(np.concatenate(([offset], ends))[:-1].astype("<i8").data)
        offset = int(ends[-1]) if len(ends) > 0 else offset
    file.write(np.zeros(1, dtype="<i8").data)
    sequence = 0
    for start in starts:
        bounds = sequence + np.cumsum(blocks[start : start + BLOCK] > 0, dtype=np.int64)
        file.write(bounds.astype("<i8").data)
        sequence = int(bounds[-1])
    return sequences
