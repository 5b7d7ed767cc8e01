"""Whether a checkpoint on the disk is what was written: by a look at its files, or by reading all of them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open

from megatron_aquila.checkpoint.folders import MANIFEST
from megatron_aquila.checkpoint.manifest import Manifest
from megatron_aquila.checkpoint.rectangles import cover_problem
from megatron_aquila.checkpoint.tensorfile import DTYPES, FileRecord, file_sha256
from megatron_aquila.errors import CheckpointError

_Content: TypeAlias = tuple[torch.dtype | None, tuple[int, ...]]


def glance(folder: Path) -> list[str]:
    """What is wrong with the step's folder as far as its manifest and the sizes of its files tell, a line each.

    Reads the manifest only: what a flipped bit in a tensor file has done takes ``examine`` to see.
    """
    try:
        manifest = Manifest.read(folder / MANIFEST)
    except CheckpointError as error:
        return [str(error)]
    return [problem for file, record in manifest.files.items() for problem in _file_problems(folder / file, record)]


def examine(folder: Path) -> list[str]:
    """All that is wrong with the step's folder, a line each; empty when it is whole. Reads and hashes every byte.

    Also looked for: tensors that the files do not cover exactly once, tensors of another shape or type in a file than
    in the manifest, and files and tensors that the manifest does not know.
    """
    problems = glance(folder)
    if problems:
        return problems
    manifest = Manifest.read(folder / MANIFEST)
    expected = _by_file(manifest)
    for name, stored in manifest.tensors.items():
        problem = cover_problem(stored.shape, [piece.rectangle for piece in stored.pieces])
        problems += [] if problem is None else [f"{folder / MANIFEST}: {name}: {problem}"]
    for file, record in manifest.files.items():
        digest = file_sha256(folder / file)
        if digest != record.sha256:
            problems.append(f"{folder / file}: it is damaged: its sha256 is {digest}, not {record.sha256}")
        else:
            problems += _content_problems(folder / file, expected[file])
    strays = sorted({path.name for path in folder.iterdir()} - {MANIFEST, *manifest.files})
    return [*problems, *(f"{folder / name}: the manifest does not know it" for name in strays)]


def _file_problems(path: Path, record: FileRecord) -> Iterator[str]:
    if path.is_symlink():
        yield f"{path}: a link, which may lead anywhere; put the file itself there"
        return
    try:
        size = path.stat().st_size
    except OSError as error:
        yield f"{path}: it cannot be read: {error.strerror}"
        return
    if size != record.size:
        yield f"{path}: it has {size} bytes instead of {record.size}"


def _by_file(manifest: Manifest) -> Mapping[str, dict[str, _Content]]:
    """What the manifest expects in each file, by key."""
    expected: dict[str, dict[str, _Content]] = {file: {} for file in manifest.files}
    for stored in manifest.tensors.values():
        for piece in stored.pieces:
            expected[piece.file][piece.key] = (stored.dtype, piece.rectangle.shape)
    return expected


def _content_problems(path: Path, expected: Mapping[str, _Content]) -> list[str]:
    """Where the table at the file's beginning is not the manifest's."""
    problems: list[str] = []
    try:
        with safe_open(path, framework="pt") as tensors:
            keys = set(tensors.keys())
            problems += [f"{path}: it holds no {key}" for key in sorted(expected.keys() - keys)]
            for key in sorted(keys & expected.keys()):
                part, wanted = tensors.get_slice(key), expected[key]
                found = (DTYPES.get(part.get_dtype()), tuple(part.get_shape()))
                if found != wanted:
                    problems.append(f"{path}: {key} is {found} in it, {wanted} in the table of contents")
    except (OSError, SafetensorError) as error:
        return [f"{path}: it cannot be read: {error}"]
    return problems + [f"{path}: the manifest does not know its {key}" for key in sorted(keys - expected.keys())]
