"""Converting weights: file by file, one tensor in memory, to be taken up again where it was killed.

What is finished lies in ``OUT.tmp`` with its hash in ``progress.json``. The folder gets its name when every tensor has
been read back byte-equal, and whoever asked for more has been satisfied.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

from megatron_aquila.checkpoint.families import Family
from megatron_aquila.checkpoint.folders import LATEST, MANIFEST, beside, step_folder, sync_folder, write_text
from megatron_aquila.checkpoint.huggingface import INDEX, read_json, shards_of, write_json
from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.llama import LEAVE_OUT_CLAMP, SpecialIds, llama_tensors
from megatron_aquila.checkpoint.manifest import Json, Manifest, Piece, StoredTensor, piece_key
from megatron_aquila.checkpoint.megatron import FILE, write_megatron, write_tracker
from megatron_aquila.checkpoint.megatron_form import MegatronForm, megatron_map
from megatron_aquila.checkpoint.published import open_weights
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.checkpoint.rectangles import Rectangle
from megatron_aquila.checkpoint.tensorfile import Entry, FileRecord, file_sha256, write_tensors
from megatron_aquila.errors import CheckpointError
from megatron_aquila.plan.shape import ModelShape

PIECE = 2**24  # elements
HEAD = "lm_head.weight"
PROGRESS = "progress.json"
CERTIFICATE = "certificate.json"
SUMS = "SHA256SUMS"
# what a folder of other programs' weights is read from
WEIGHTS = ("config.json", "*.index.json", "*.safetensors", "*.bin", "*.pth", "*.pt", f"mp_rank_*/{FILE}")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A form to write: ``files`` one after the other, each by its own call, then by ``finish`` what names them.

    ``reopen`` opens the finished folder. ``max_bytes``: the size at which tensors were split over files, where ``kind``
    does not say how they lie.
    """

    kind: str
    files: Mapping[str, Callable[[Path], FileRecord]]
    finish: Callable[[Path, Mapping[str, FileRecord]], None]
    reopen: Callable[[Path], TensorReader]
    max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a conversion reads: ``content`` as ``content_of`` has it, and the tokenizer's fingerprint, where it has one.

    A killed conversion goes on with the same alone.
    """

    content: str
    tokenizer: str | None = None


def content_of(reader: TensorReader) -> str:
    """A hash that stands for the reader's weights: over the hashes of their files where the format records them, else
    over their sizes and times. Other files, an output inside the folder among them, do not count. Raises OSError.
    """
    records = {name: record.sha256 for name, record in reader.files.items()}
    if not records:
        paths = sorted(path for pattern in WEIGHTS for path in reader.folder.glob(pattern) if path.is_file())
        found = ((path, path.stat()) for path in paths)
        records = {str(path.relative_to(reader.folder)): f"{x.st_size} {x.st_mtime_ns}" for path, x in found}
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def convert(
    reader: TensorReader,
    shape: ModelShape,
    target: Target,
    out_dir: Path,
    *,
    dtype: torch.dtype,
    inputs: Inputs,
    workers: int = 1,
) -> Path:
    """Write ``target`` beside ``out_dir`` and read every tensor back; returns the folder, under its temporary name.

    Files that an earlier, killed run has finished are kept where they still have their hash. ``workers`` threads write
    a file each, and have a tensor each in memory; the bytes do not depend on them. Leaves a certificate.
    Raises CheckpointError when the reader has not the tensors of ``shape``, a value is not finite in ``dtype``, a
    tensor comes back other than it was, or the killed run had another tokenizer.
    """
    for name, size in llama_tensors(shape).items():
        found = reader.tensors[name].shape if name in reader.tensors else None
        if found != size:
            raise CheckpointError(f"{reader.folder}: {name} has shape {found}, a model of this shape needs {size}")
    folder = beside(out_dir, "tmp")
    plan = {"from": str(reader.folder.resolve()), "to": target.kind, "dtype": str(dtype), "shape": asdict(shape)}
    plan |= asdict(inputs)
    noted = plan | {"files": [*target.files], "max_bytes": target.max_bytes}
    done = finished_files(folder, noted)
    _note(folder, noted, done)  # before the first file: what lies there is known to be ours
    lock = Lock()

    def write(name: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        record = target.files[name](folder / name)
        with lock:
            done[name] = record
            _note(folder, noted, done)

    _in_threads(workers, write, [name for name in target.files if name not in done])
    target.finish(folder, {name: done[name] for name in target.files})
    hashes = _read_back(reader, target.reopen(folder), shape, dtype, workers)
    write_json(folder / CERTIFICATE, {**plan, "round_trip": "byte-equal", "sha256": hashes})
    return folder


@contextmanager
def alone(out_dir: Path) -> Iterator[None]:
    """Nobody else converts into ``out_dir`` for the body's length.

    Raises CheckpointError when it exists, somebody does, or files that no conversion has left lie where it would write.
    """
    if out_dir.exists():
        if (out_dir / CERTIFICATE).is_file():
            (out_dir / PROGRESS).unlink(missing_ok=True)  # killed when the folder had its name already
        raise CheckpointError(f"{out_dir}: it exists already; choose a new folder or remove it")
    folder = beside(out_dir, "tmp")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            way_out = "wait for it, or end it"
            raise CheckpointError(f"{folder}: another process is converting into it; {way_out}") from error
        names = {path.name for path in folder.iterdir()}
        if names and names.isdisjoint({PROGRESS, beside(Path(PROGRESS), "tmp").name, CERTIFICATE}):
            way_out = "move it elsewhere"
            raise CheckpointError(f"{folder}: a conversion works there, but what it holds is of none; {way_out}")
        yield
    finally:
        os.close(handle)


def publish(folder: Path, out_dir: Path, *, logits: str) -> None:
    """Note in the certificate how logits were compared, write SHA256SUMS, give the folder its name. Raises OSError.

    Killed before it has its name, the folder is taken up again; after that, it is whole.
    """
    write_json(folder / CERTIFICATE, read_json(folder / CERTIFICATE) | {"logits": logits})
    known = {name: record[1] for name, record in read_json(folder / PROGRESS)["done"].items()}
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {PROGRESS, SUMS}
    lines = [f"{known.get(name) or file_sha256(folder / name)}  {name}\n" for name in sorted(names)]
    write_text(folder / SUMS, "".join(lines))
    os.rename(folder, out_dir)
    sync_folder(out_dir.parent)
    (out_dir / PROGRESS).unlink(missing_ok=True)


def finished_files(folder: Path, plan: Mapping[str, object]) -> dict[str, FileRecord]:
    """Files of a killed run of the same plan that are whole; of another plan the folder is emptied.

    Raises CheckpointError where the tokenizer alone is another: nobody asked for that with a flag.
    """
    plan = json.loads(json.dumps(plan))
    if (folder / PROGRESS).is_file():
        noted = read_json(folder / PROGRESS)
        before = noted.get("plan", {})
        if before != plan and before | {"tokenizer": plan["tokenizer"]} == plan:
            raise CheckpointError(
                f"{folder}: the conversion that it holds was begun with another tokenizer (fingerprint "
                f"{str(before['tokenizer'])[:12]}, not {str(plan['tokenizer'])[:12]}); give that one, or remove the "
                "folder"
            )
        if before == plan:
            found = {name: FileRecord(*record) for name, record in noted["done"].items()}
            return {name: record for name, record in found.items() if _is_whole(folder / name, record)}
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():  # not the folder itself, which is locked
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != PROGRESS:  # by which the folder is known to be ours, until it is written anew
            path.unlink()
    return {}


def _is_whole(path: Path, record: FileRecord) -> bool:
    return path.is_file() and path.stat().st_size == record.size and file_sha256(path) == record.sha256


def _note(folder: Path, plan: Mapping[str, object], done: Mapping[str, FileRecord]) -> None:
    write_json(folder / PROGRESS, {"plan": plan, "done": {name: (one.size, one.sha256) for name, one in done.items()}})


def _in_threads(workers: int, work: Callable[[str], Result], names: Sequence[str]) -> list[Result]:
    """The results in order. What is not begun when one raises never is. Torch, hashing and the disk need no lock."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="convert")
    try:
        futures = [pool.submit(work, name) for name in names]
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


def _read_back(
    reader: TensorReader, written: TensorReader, shape: ModelShape, dtype: torch.dtype, workers: int
) -> dict[str, str]:
    """The hash of every tensor, equal on both sides."""

    def hashed(name: str) -> str:
        ours, theirs = digest(reader.read(name, dtype)), digest(written.read(name))
        if ours != theirs:
            raise CheckpointError(
                f"{written.folder}: {name} was read back other than it was written; nothing was named"
            )
        return ours

    names = [*llama_tensors(shape)]
    return dict(zip(names, _in_threads(workers, hashed, names), strict=True))


class PlainHead(TensorReader):
    """A model whose head's rows are used at length 1, as one whose rows have it: for programs that know no other."""

    def __init__(self, reader: TensorReader) -> None:
        super().__init__(reader.folder, reader.tensors, files={})
        self._reader = reader

    def shape_fields(self) -> Mapping[str, object]:
        """Those of the model, with a plain head."""
        return {**self._reader.shape_fields(), "norm_head": False, "max_z_loss": 0.0}

    def read_into(self, chunks: Sequence[Chunk], *, cast: bool = False, verify_hash: bool = True) -> None:
        """As the reader's; the head's rows are divided by their length, in float32 or wider, and rounded once."""
        self._reader.read_into([chunk for chunk in chunks if chunk.name != HEAD], cast=cast, verify_hash=verify_hash)
        if heads := [chunk for chunk in chunks if chunk.name == HEAD]:
            stored = self._reader.read(HEAD)
            wide = stored.to(torch.promote_types(stored.dtype, torch.float32))
            plain = torch.nn.functional.normalize(wide, dim=1).to(stored.dtype)
            for chunk in heads:
                chunk.tensor.copy_(plain[chunk.rectangle.within(Rectangle((0, 0), tuple(plain.shape)))])


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in hex."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


def finite(reader: TensorReader, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor as it will be written. Raises CheckpointError for a value that ``dtype`` does not hold."""
    tensor = reader.read(name, dtype)
    # in pieces, as it takes memory of its own
    if not all(piece.isfinite().all() for piece in torch.split(tensor.flatten(), PIECE)):
        raise CheckpointError(f"{reader.folder}: {name} has values that are not finite in {dtype}; choose a wider type")
    return tensor


def huggingface_target(
    reader: TensorReader,
    shape: ModelShape,
    family: Family,
    *,
    dtype: torch.dtype,
    max_bytes: int,
    ids: SpecialIds,
    generation: Mapping[str, object] | None = None,
) -> Target:
    """Published files of ``family``: config.json, generation_config.json, safetensors shards and their index.

    ``generation``: what generation_config.json says beside the special ids, or instead of them.
    """
    why = family.cannot_hold(shape)
    if why is not None:
        raise CheckpointError(f"--family {family.name}: its files cannot hold this model: {why}")
    tensor_map, read = family.tensor_map(shape), partial(finite, reader, dtype)
    entries = [
        Entry(key, dtype, size, partial(tensor_map.their_tensor, key, read)) for key, size in tensor_map.theirs.items()
    ]
    shards = list(shards_of(entries, max_bytes))
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]

    def finish(folder: Path, _records: Mapping[str, FileRecord]) -> None:
        weight_map = {entry.key: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        total = sum(entry.num_bytes for entry in entries)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(folder / "config.json", family.config(shape, dtype, ids))
        special = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
        write_json(folder / "generation_config.json", {**special, **({} if generation is None else generation)})

    return Target(
        kind=f"huggingface {family.name}",
        files={name: partial(_write_shard, shard, {"format": "pt"}) for name, shard in zip(names, shards, strict=True)},
        finish=finish,
        reopen=partial(open_weights, family=family.name, position_embedding=shape.position_embedding),
        max_bytes=max_bytes,
    )


def checkpoint_target(
    reader: TensorReader, shape: ModelShape, *, dtype: torch.dtype, max_bytes: int, state: Mapping[str, Json]
) -> Target:
    """A checkpoint of ours at step 0, of weights alone."""
    read = partial(finite, reader, dtype)
    entries = [
        Entry(piece_key(name, (0,) * len(size)), dtype, size, partial(read, name))
        for name, size in llama_tensors(shape).items()
    ]
    shards = list(shards_of(entries, max_bytes))
    step = step_folder(Path(), 0)
    files = {str(step / f"rank_{number:05d}.safetensors"): shard for number, shard in enumerate(shards)}

    def finish(folder: Path, records: Mapping[str, FileRecord]) -> None:
        tensors = {
            entry.key.partition("@")[0]: StoredTensor(
                entry.shape,
                dtype,
                (Piece(Path(file).name, entry.key, Rectangle((0,) * len(entry.shape), entry.shape)),),
            )
            for file, shard in files.items()
            for entry in shard
        }
        named = {Path(file).name: record for file, record in records.items()}
        manifest = Manifest(step=0, state={**state, "shape": asdict(shape)}, files=named, tensors=tensors)
        write_text(folder / step / MANIFEST, manifest.render())
        write_text(folder / LATEST, f"{step.name}\n")

    return Target(
        kind="checkpoint",
        files={file: partial(_write_shard, shard, None) for file, shard in files.items()},
        finish=finish,
        reopen=lambda folder: open_weights(folder / step),
        max_bytes=max_bytes,
    )


def megatron_target(reader: TensorReader, shape: ModelShape, form: MegatronForm, *, dtype: torch.dtype) -> Target:
    """Megatron's classic checkpoint, iteration 0."""
    if shape.position_embedding == "alibi" or shape.norm_head:
        raise CheckpointError("Megatron's classic form has rotary positions and a plain head; this model has others")
    if shape.rope_scaling != "none":
        raise CheckpointError(
            f"Megatron's classic form has no word for stretched rotary positions; this model's are {shape.rope_scaling}"
        )
    if shape.score_clamp is not None:
        raise CheckpointError(f"Megatron's classic form does not clamp scores; {LEAVE_OUT_CLAMP}")
    megatron_map(shape, form)  # says now what does not divide
    read = partial(finite, reader, dtype)
    ranks = [form.folder(tp, pp) for pp in range(form.pp) for tp in range(form.tp)]

    def write(rank: str, path: Path) -> FileRecord:
        write_megatron(path.parents[2], shape, form, read, iteration=0, dtype=dtype, only=rank)
        return FileRecord(path.stat().st_size, file_sha256(path))

    return Target(
        kind=f"megatron {form}",
        files={f"iter_0000000/{rank}/{FILE}": partial(write, rank) for rank in ranks},
        finish=lambda folder, _: write_tracker(folder, 0),
        reopen=partial(open_weights, vocab_size=shape.vocab_size, position_embedding=shape.position_embedding),
    )


def _write_shard(entries: Sequence[Entry], metadata: Mapping[str, str] | None, path: Path) -> FileRecord:
    return write_tensors(path, entries, metadata)
