"""Shards joined in their order into data sets, under names that appear when all is written; and where to go on.

``PREFIX.partial/`` holds shards that wait for their turn, one growing file a stream, and ``journal.jsonl``: the plan,
then a line for each shard that was appended. A killed run is continued from there; the folder goes when all is done.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from megatron_aquila.data.filters import SeenHashes
from megatron_aquila.data.hashed import HashedFile
from megatron_aquila.data.indexed import CODE_OF_DTYPE, HEADER, MAGIC, VERSION
from megatron_aquila.data.journal import Appended, Journal, Story
from megatron_aquila.data.manifest import (
    Contents,
    Manifest,
    Origin,
    manifest_of,
    manifest_path,
    remove_manifest,
    write_manifest,
)
from megatron_aquila.data.selection import select
from megatron_aquila.data.shards import BAD, HASHES, META, Counts, Shard, shard_folder
from megatron_aquila.errors import ConfigError, DataError, Problem

BLOCK: Final = 1 << 19  # documents whose part of the index is made at once


def document_prefix(prefix: str, name: str) -> str:
    """A data set's prefix, as Megatron-LM names it."""
    return f"{prefix}_{name}_document"


def partial_folder(prefix: str) -> Path:
    """Where an output grows."""
    return Path(f"{prefix}.partial")


def beside_paths(prefix: str) -> dict[str, Path]:
    """What may lie beside the data sets, by the name of its stream."""
    return {name: Path(f"{prefix}.{name}") for name in (META, BAD)}


def final_paths(prefix: str, names: Sequence[str]) -> list[Path]:
    """Every file that an output of the data sets ``names`` may have."""
    prefixes = [document_prefix(prefix, name) for name in names]
    pairs = [Path(f"{each}.{end}") for each in prefixes for end in ("bin", "idx")]
    return [*pairs, *beside_paths(prefix).values(), *map(manifest_path, prefixes)]


def is_output_of(prefix: str) -> Callable[[Path], bool]:
    """Whether a path is what runs with this ``--output-prefix`` write, or lies in it; of ``--shard``'s parts, too."""
    folder, name = Path(prefix).parent.resolve(), re.escape(Path(prefix).name)
    beside = "|".join(map(re.escape, ("partial", META, BAD)))
    written = re.compile(
        rf"{name}(_shard\d+of\d+)?(\.({beside})|_.+_document\.(bin|idx|manifest\.json)(\.\d+\.tmp)?)", re.DOTALL
    )

    def is_output(path: Path) -> bool:
        return any(
            written.fullmatch(part) is not None and Path(*path.parts[:depth]).resolve() == folder
            for depth, part in enumerate(path.parts)
        )

    return is_output


class Output:
    """The growing data sets of ``prefix`` and the journal of what is in them.

    ``names`` are the data sets' keys, ``streams`` the files of a shard, ``plan`` what must be the same for a run to go
    on where another stopped.

    Attributes:
        num_shards: appended so far, by this run and those it continues.
        last: the place of the last of them, before all others where there is none.
        file_bytes: of the inputs as on disk that they stand for.
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
        self.folder = partial_folder(prefix)
        self.num_shards, self.counts, self.largest = 0, Counts(), [-1] * len(self.names)
        self.last, self.file_bytes = (-1, 0), 0
        self._plan = json.loads(json.dumps(plan))
        self._files: dict[str, HashedFile] = {}
        self._manifests: dict[str, Manifest] | None = None  # those of a run that was killed while it published
        self._extra: tuple[str, ...] = ()
        self._seen = SeenHashes() if HASHES in streams else None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(self.folder)
            try:
                last = self._resume(overwrite=overwrite)
            except BaseException:
                if self._journal.path.stat().st_size == 0:  # else what lies there is an unfinished run's
                    self.discard()
                self._journal.close()
                raise
            try:
                self._open(streams, last)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise DataError(f"{error.filename or self.folder}: cannot be written: {error.strerror}") from error

    def _resume(self, *, overwrite: bool) -> Appended | None:
        """Go on with the journal or begin anew; returns what was appended last."""
        story = self._told(overwrite=overwrite)
        begun = story.plan or {}
        differing = [key for key in self._plan if begun and begun.get(key) != self._plan[key]]
        is_resumable = self._plan["is_resumable"]
        if differing and not overwrite and (is_resumable or begun.get("is_resumable")):
            why = f"{self.folder} holds an unfinished run with other {', '.join(differing)}"
            way_out = "give the same settings to go on, --overwrite to begin anew, or another prefix"
            raise ConfigError([Problem("--output-prefix", self.prefix, why, way_out)])
        goes_on = len(begun) > 0 and not differing and is_resumable
        said = story.manifests if goes_on else None
        self._manifests = None if said is None else {name: manifest_of(each) for name, each in said.items()}
        if self._manifests is None:
            self._refuse_existing(overwrite=overwrite)
        if not goes_on:
            self._begin()
            return None
        for path in self.folder.iterdir():
            if path.is_dir() and "." in path.name:  # of a worker that died
                shutil.rmtree(path)
        self._extra = story.extra
        for appended in story.appended:
            self._add(appended.shard)
        return story.appended[-1] if story.appended else None

    def _told(self, *, overwrite: bool) -> Story:
        """The journal's story; a damaged one does not keep anybody from beginning anew."""
        try:
            return self._journal.read()
        except DataError:
            if overwrite:
                return Story()
            raise

    def _refuse_existing(self, *, overwrite: bool) -> None:
        """Also of a run that was begun when nothing was there; its folder stays."""
        existing = [path for path in final_paths(self.prefix, self.names) if path.exists()]
        if existing and not overwrite:
            why = f"{existing[0]} is there already"
            way_out = "give --overwrite to replace it when the new one is whole, or another prefix"
            raise ConfigError([Problem("--output-prefix", self.prefix, why, way_out)])

    def _begin(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        self._journal.begin(self._plan)

    def _open(self, streams: Sequence[str], last: Appended | None) -> None:
        """The growing files as they were when the last shard was appended; what lies there must be what was written."""
        if self._manifests is not None:
            return
        self._files = {name: HashedFile(self.folder / name, 0 if last is None else last.ends[name]) for name in streams}
        if last is None:
            return
        for name, file in self._files.items():
            if file.facts().sha256 != last.digests[name]:
                raise DataError(f"{file.path}: was changed since it was written; remove it all to begin anew")
        if self._seen is not None:
            self._seen.load(self.folder / HASHES)

    def append(self, shard: Shard, lines_before: int = 0) -> Shard:
        """Move a shard to the end of the streams, and say what of it; the next block or piece must be the next one.

        Where hashes are among the streams, a document that an earlier one equals is left out. ``lines_before`` is how
        many records its file has before the shard, for the lines of provenance.

        Raises:
            DataError: a file cannot be read or written, as on a full disk; what was appended before stays.
        """
        index, block = self.last
        assert shard.place in ((index, block + 1), (index + 1, 0)), f"shard {shard.place} after {self.last}"
        source = shard_folder(self.folder, shard.place)
        try:
            selected = select(source, self._seen)
            for name, file in self._files.items():
                for part in selected.parts(name, self.dtype, first=self.counts.documents, lines_before=lines_before):
                    file.write(part)
                file.flush()
            kept = replace(shard, counts=selected.counts(shard.counts, self.names))
            facts = {name: file.facts() for name, file in self._files.items()}
            ends, digests = ({name: getattr(each, what) for name, each in facts.items()} for what in ("size", "sha256"))
            self._journal.add(Appended(kept, ends, digests))
            self._add(kept)
            shutil.rmtree(source)
            return kept
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
                self._manifests = {name: self._manifest(name, largest, origin) for name, largest in self._largest()}
                for file in self._files.values():
                    file.close()
                beside = [name for name in beside_paths(self.prefix) if name in self._files]
                self._extra = tuple(name for name in beside if self._files[name].size > 0)
                self._journal.finish({name: asdict(each) for name, each in self._manifests.items()}, self._extra)
            self._publish(self._extra)
        except OSError as error:
            raise DataError(f"{self.prefix}: cannot be written: {error.strerror}; the same command goes on") from error
        for name, manifest in self._manifests.items():
            write_manifest(document_prefix(self.prefix, name), manifest)
        shutil.rmtree(self.folder)
        return self._manifests

    def _publish(self, extra: Sequence[str]) -> None:
        """Give the files their names; may be done again after it was killed half-way.

        The old manifests go first: they name the file of provenance, which is another then.
        """
        for name in self.names:
            remove_manifest(document_prefix(self.prefix, name))
        for name, path in beside_paths(self.prefix).items():
            if name not in extra:
                path.unlink(missing_ok=True)  # of the data set that is replaced
            elif (self.folder / name).exists():
                (self.folder / name).replace(path)
        for name in self.names:
            prefix = document_prefix(self.prefix, name)
            bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
            index, tokens = self.folder / f"{name}.idx", self.folder / f"{name}.bin"
            if index.exists():
                idx_path.unlink(missing_ok=True)
                bin_path.unlink(missing_ok=True)
                index.replace(idx_path)
            if tokens.exists():
                tokens.replace(bin_path)

    def discard(self) -> None:
        """Remove what was begun, where there is nothing to go on with."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let go of the folder; nothing is kept of it where no shard was finished."""
        self._journal.close()
        for file in self._files.values():
            file.abandon()
        if self.num_shards == 0:
            self.discard()

    def _largest(self) -> list[tuple[str, int]]:
        return list(zip(self.names, self.largest, strict=True))

    def _manifest(self, name: str, largest: int, origin: Origin) -> Manifest:
        tokens = self._files[f"{name}.bin"].facts()
        self._files[f"{name}.lengths"].flush()
        with HashedFile(self.folder / f"{name}.idx") as index:
            sequences = write_index(index, self.folder / f"{name}.lengths", self.dtype)
        contents = Contents(
            documents=self._files[f"{name}.lengths"].size // 4,
            sequences=sequences,
            tokens=tokens.size // self.dtype.itemsize,
            dtype=self.dtype.name,
            largest_token=None if largest < 0 else largest,
            bin=tokens,
            idx=index.facts(),
        )
        lines = self._files.get(META)
        said = None if lines is None or lines.size == 0 else lines.facts()
        return Manifest(contents=contents, origin=replace(origin, provenance=said))

    def _add(self, shard: Shard) -> None:
        self.num_shards, self.last = self.num_shards + 1, shard.place
        self.file_bytes += shard.file_bytes
        self.counts += shard.counts
        self.largest = list(map(max, self.largest, shard.largest))


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
