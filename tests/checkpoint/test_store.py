"""Saving at one layout and loading at another, and what is left when something goes wrong."""

import errno
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from megatron_aquila.checkpoint import folders, tensorfile
from megatron_aquila.checkpoint.folders import find_checkpoint
from megatron_aquila.checkpoint.layout import Chunk, range_chunks
from megatron_aquila.checkpoint.staging import Staging
from megatron_aquila.checkpoint.store import CheckpointReader, Save
from megatron_aquila.errors import CheckpointError
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.verify.pool import WorkerPool
from tests.checkpoint.numbers import save_checkpoint
from tests.checkpoint.toy import (
    SHAPE,
    SHAPES,
    assert_filled,
    fill,
    logical,
    optimizer_chunks,
    owned_ranges,
    parameters,
    whole_chunks,
)

Pool = Callable[[int], WorkerPool]
STATE = {"shape": asdict(SHAPE), "consumed_samples": 7, "note": "统一", "counts": {10: 1, 9: 2}}
DTYPES = {"bf16": (torch.bfloat16, torch.float32), "fp64": (torch.float64, torch.float64)}
LAYOUTS = [{"tp": 2, "dp": 2}, {"tp": 4}, {"dp": 4}, {"pp": 2, "dp": 2}, {"tp": 2, "pp": 2}]


def save(layout: dict[str, int], root: Path, precision: str, step: int = 100) -> str:
    """Weights and moments, each rank what its optimizer shard owns."""
    ctx = ParallelContext.create(RankGrid(**layout), torch.device("cpu"))
    dtype, state_dtype = DTYPES[precision]
    infos = parameters(ctx.tp.rank, ctx.tp.size, dtype, pp_rank=ctx.pp.rank, pp=ctx.pp.size)
    ranges = owned_ranges(infos, ctx.dp.rank, ctx.dp.size)
    fill(whole_chunks(infos))
    chunks = optimizer_chunks(ranges, state_dtype)
    for one in ranges:
        chunks += range_chunks(one, one.info.param.detach().view(-1)[one.start : one.stop])
    fill(chunks)
    return save_checkpoint(root, step, chunks, STATE, ctx).name


def load(layout: dict[str, int], root: Path, precision: str) -> int:
    """Everything that a rank of ``layout`` holds, bit for bit."""
    ctx = ParallelContext.create(RankGrid(**layout), torch.device("cpu"))
    dtype, state_dtype = DTYPES[precision]
    infos = parameters(ctx.tp.rank, ctx.tp.size, dtype, pp_rank=ctx.pp.rank, pp=ctx.pp.size)
    chunks = whole_chunks(infos) + optimizer_chunks(owned_ranges(infos, ctx.dp.rank, ctx.dp.size), state_dtype)
    reader = CheckpointReader(root)
    reader.verify_files(ctx.world)
    reader.read_into(chunks)
    assert_filled(chunks)
    assert reader.step == 100
    return len(chunks)


@pytest.mark.parametrize("precision", DTYPES)
def test_saved_at_one_layout_loaded_at_any_other(pool: Pool, tmp_path: Path, precision: str) -> None:
    layouts = LAYOUTS if precision == "bf16" else LAYOUTS[:2]
    for number, layout in enumerate(layouts):
        root = tmp_path / str(number)
        assert pool(4).run(save, layout, root, precision) == ["step_0000100"] * 4
        assert (root / "latest").read_text() == "step_0000100\n"
        assert sorted(path.name for path in root.iterdir()) == ["latest", "step_0000100"]
        for other in layouts:
            assert min(pool(4).run(load, other, root, precision)) > 0
        load({}, root, precision)
        reader = CheckpointReader(root)
        assert {name: stored.shape for name, stored in reader.tensors.items() if "optimizer" not in name} == SHAPES
        for name in reader.tensors:
            assert torch.equal(reader.read(name), logical(name, reader.tensors[name].dtype)), name
        assert reader.shape() == SHAPE
        assert reader.state["counts"] == {"10": 1, "9": 2}


def save_whole(root: Path) -> list[str]:
    """Data-parallel replicas offer the same whole parameters."""
    ctx = ParallelContext.create(RankGrid(tp=2, dp=2), torch.device("cpu"))
    chunks = whole_chunks(parameters(ctx.tp.rank, ctx.tp.size, torch.float32))
    fill(chunks)
    save_checkpoint(root, 1, chunks, {}, ctx)
    return sorted(path.name for path in (root / "step_0000001").iterdir())


def test_of_equal_replicas_one_is_written(pool: Pool, tmp_path: Path) -> None:
    files = ["manifest.json", "rank_00000.safetensors", "rank_00001.safetensors"]
    assert pool(4).run(save_whole, tmp_path) == [files] * 4
    reader = CheckpointReader(tmp_path)
    assert all(torch.equal(reader.read(name), logical(name, torch.float32)) for name in SHAPES)


def save_where_one_fails(root: Path, how: str) -> str:
    """Save step 2 over a good step 1 with a disk that is full, or chunks that are wrong, on rank 1."""
    ctx = ParallelContext.create(RankGrid(dp=2), torch.device("cpu"))
    ranges = owned_ranges(parameters(0, 1, torch.float32), ctx.dp.rank, 2)
    chunks = optimizer_chunks(ranges, torch.float32)
    fill(chunks)
    save_checkpoint(root, 1, chunks, {}, ctx)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ctx.rank == 1:
        # a tensor of which rank 0 holds the other part
        cut = next(chunk for chunk in chunks if chunk.tensor.numel() < math.prod(chunk.global_shape))
        if how == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        elif how == "missing":
            chunks.remove(cut)
        elif how == "shape":
            chunks[chunks.index(cut)] = replace(cut, global_shape=(99, 12))
        elif how == "overlap":
            chunks.append(replace(cut, offset=(cut.offset[0] - 1, *cut.offset[1:])))
    try:
        save_checkpoint(root, 2, chunks, {}, ctx)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return "saved"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("full", "File too large (rank 1)"),
        ("missing", "elements are held by any rank; nothing was saved"),
        ("overlap", "overlap; nothing was saved"),
        ("shape", "rank 1 has it as ((99, 12), 'F32'), an earlier rank as"),
        ("none", "saved"),
    ],
)
def test_a_failure_on_one_rank_is_one_on_all(pool: Pool, tmp_path: Path, how: str, reason: str) -> None:
    first, second = pool(2).run(save_where_one_fails, tmp_path, how)
    assert first == second
    assert reason in first
    assert how == "none" or str(tmp_path / "step_0000002") in first
    left = ["latest", "step_0000001"] + (["step_0000002"] if how == "none" else [])
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert CheckpointReader(tmp_path).step == len(left) - 1


def numbers(value: float) -> list[Chunk]:
    return [
        Chunk("weight", (6,), (0,), torch.full((6,), value)),
        Chunk("other", (2, 2), (0, 0), torch.ones(2, 2)),
    ]


def save_numbers(root: Path, step: int, value: float) -> Path:
    return save_checkpoint(root, step, numbers(value), {"value": value}, ParallelContext.single())


def save_behind(root: Path, step: int, value: float) -> Path:
    """As ``save_numbers``, by a thread that writes copies: what they were copied from is trained on at once."""
    staging = Staging(torch.device("cpu"), limit_bytes=32, block_bytes=16)  # blocks come around several times
    chunks = numbers(value)
    save = Save(root, step, chunks, {"value": value}, ParallelContext.single().host_world, staging)
    for chunk in chunks:
        chunk.tensor.fill_(-1.0)
    deadline = time.monotonic() + 60
    while not save.is_written:
        assert time.monotonic() < deadline, "the thread does not end"
        time.sleep(0.001)
    return save.finish()


SAVES = {"at once": save_numbers, "behind training": save_behind}


def read_value(root: Path) -> float:
    reader = CheckpointReader(root)
    assert reader.read("weight").tolist() == [reader.state["value"]] * 6
    assert reader.read("other").tolist() == [[1.0, 1.0]] * 2
    return float(reader.read("weight")[0])


def in_a_child(action: Callable[[], object]) -> int:
    """Run in a forked process; 0 when it ended well, else the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


DISK_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
SYSTEM_CALLS = [(folders.os, "rename"), (folders.os, "replace"), (tensorfile.os, "fsync"), (folders.shutil, "rmtree")]


def counting(monkeypatch: pytest.MonkeyPatch, number: int, strike: Callable[[], None]) -> None:
    """``strike`` instead of the ``number``-th change to the disk."""
    seen: Iterator[int] = iter(range(1000))

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            if next(seen) == number:
                strike()
            return call(*args, **kwargs)

        return wrapped

    for module, name in SYSTEM_CALLS:
        monkeypatch.setattr(module, name, counted(getattr(module, name)))


def kill_at(number: int, root: Path) -> None:
    """End this process, whichever of its threads it is in, at its ``number``-th call that touches ``root`` from here.

    There is no way back: for a child.
    """
    seen: Iterator[int] = iter(range(1000))

    def strike() -> None:
        if next(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def audited(event: str, args: tuple[object, ...]) -> None:
        if event in DISK_EVENTS and (event != "open" or str(root) in str(args[0])):
            strike()

    def flushed(file: int) -> None:
        strike()
        right(file)

    right, tensorfile.os.fsync = os.fsync, flushed
    sys.addaudithook(audited)


@pytest.mark.parametrize("how", SAVES)
@pytest.mark.parametrize("step", [1, 2], ids=["over the same step", "another step"])
def test_killed_at_any_point_latest_names_a_whole_checkpoint(tmp_path: Path, step: int, how: str) -> None:
    seen: set[float] = set()
    for number in range(100):
        root = tmp_path / str(number)
        save_numbers(root, 1, 1.0)

        def killed(root: Path = root, number: int = number) -> None:
            kill_at(number, root)
            SAVES[how](root, step, 2.0)

        status = in_a_child(killed)
        value = read_value(root)
        seen.add(value)
        assert value == (2.0 if status == 0 else value)
        # Whatever was left, the next save ends well and leaves nothing but final names.
        save_numbers(root, step, 3.0)
        assert read_value(root) == 3.0
        assert {path.suffix for path in root.iterdir()} <= {""}
        if status == 0:
            assert number > 14, f"only {number} calls were seen"
            break
        assert status == -signal.SIGKILL
    else:
        pytest.fail("the save never ended")
    assert seen == {1.0, 2.0}


@pytest.mark.parametrize("how", SAVES)
def test_a_full_disk_at_any_point(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for number in range(100):
        root = tmp_path / str(number)
        save_numbers(root, 1, 1.0)
        with monkeypatch.context() as patch:
            counting(patch, number, full)
            refusal = why_not_saved(root, SAVES[how])
        assert read_value(root) in (1.0, 2.0)
        assert not list(root.glob("step*.tmp"))
        if refusal is None:
            assert number > 8, f"only {number} changes to the disk were seen"
            return
        assert refusal.startswith(f"{root / 'step_0000002'}: it could not be saved: [Errno 28] No space left on device")
    pytest.fail("the save never ended")


def why_not_saved(root: Path, save: Callable[[Path, int, float], Path] = save_numbers) -> str | None:
    try:
        save(root, 2, 2.0)
    except CheckpointError as error:
        return str(error)
    return None


def test_an_exception_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    save_numbers(tmp_path, 1, 1.0)
    bad = Chunk("weight", (2,), (0,), torch.zeros(2).to(torch.float8_e5m2))
    with pytest.raises(CheckpointError, match=r"float8.* has no name in safetensors"):
        save_checkpoint(tmp_path, 2, [bad], {}, ParallelContext.single())
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        save_checkpoint(tmp_path, 2, numbers(2.0), {"path": tmp_path}, ParallelContext.single())  # type: ignore[dict-item]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_0000001"]
    assert read_value(tmp_path) == 1.0


def test_files_that_did_not_arrive_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on nodes whose file systems are not shared."""
    original = tensorfile.os.fsync

    def cut(handle: int) -> None:
        original(handle)
        os.truncate(handle, 16)

    monkeypatch.setattr(tensorfile.os, "fsync", cut)
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors: 16 bytes arrived of"):
        save_numbers(tmp_path, 1, 1.0)
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_is_readable(tmp_path: Path) -> None:
    text = (save_numbers(tmp_path, 1, 1.5) / "manifest.json").read_text()
    lines = text.splitlines()
    assert '"format": 1,' in lines
    assert ' "value": 1.5' in lines
    assert any(line.startswith(' "weight": {"dtype": "F32", "shape": [6], "pieces": [["rank_00000') for line in lines)
    assert json.loads(text)["step"] == 1


def test_find_checkpoint(tmp_path: Path) -> None:
    save_numbers(tmp_path, 1, 1.0)
    save_numbers(tmp_path, 2, 2.0)
    assert find_checkpoint(tmp_path).name == "step_0000002"
    assert find_checkpoint(tmp_path / "step_0000001").name == "step_0000001"


def test_a_missing_checkpoint_is_an_error(tmp_path: Path) -> None:
    def refused(path: Path, reason: str) -> None:
        with pytest.raises(CheckpointError, match=reason) as caught:
            CheckpointReader(path)
        assert str(tmp_path) in str(caught.value)

    refused(tmp_path / "nowhere", "there is no such folder")
    refused(tmp_path, "no file `latest` and no manifest.json; no save has finished here")
    save_numbers(tmp_path, 1, 1.0)
    (tmp_path / "latest").unlink()
    refused(tmp_path, "name one of its checkpoints: step_0000001")
    (tmp_path / "latest").write_text("../elsewhere")
    refused(tmp_path, "latest: '../elsewhere' is not the name of a step")
    (tmp_path / "latest").write_text("step_0000009\n")
    refused(tmp_path, "latest: it names step_0000009, which is not there")
    (tmp_path / "step_0000001").rename(tmp_path / "step_0000001.tmp")
    refused(tmp_path / "step_0000001.tmp", "a save that never finished")


def edit(path: Path, at: int, change: Callable[[int], int] = lambda byte: byte ^ 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] = change(data[at])
    path.write_bytes(data)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    file = save_numbers(tmp_path, 1, 1.0) / "rank_00000.safetensors"
    whole = file.read_bytes()

    def refused(reason: str, **options: bool) -> None:
        with pytest.raises(CheckpointError, match=f"rank_00000.safetensors: {reason}"):
            CheckpointReader(tmp_path).read_into(numbers(0.0), **options)

    for at in (0, len(whole) // 2, len(whole) - 1):
        edit(file, at)
        refused("it is damaged: its sha256 is")
        file.write_bytes(whole)
    file.write_bytes(whole[:-1])
    refused(f"it has {len(whole) - 1} bytes instead of {len(whole)}")
    refused("it cannot be read", verify_hash=False)
    file.write_bytes(whole.replace(b'"F32"', b'"I32"'))
    refused(r"weight@0 is \(torch.int32, \(6,\)\) in it, \(torch.float32", verify_hash=False)
    file.write_bytes(whole.replace(b"weight@0", b"weight@1"))
    refused("it cannot be read.*weight@0", verify_hash=False)
    file.unlink()
    refused("it cannot be read: No such file")


def test_a_damaged_or_foreign_manifest_is_named(tmp_path: Path) -> None:
    path = save_numbers(tmp_path, 1, 1.0) / "manifest.json"
    text = path.read_text()

    def refused(changed: str | bytes, reason: str) -> None:
        path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
        with pytest.raises(CheckpointError, match=f"manifest.json: {reason}"):
            CheckpointReader(tmp_path)

    refused(text.replace('"format": 1', '"format": 2'), "its format is 2, this program reads format 1")
    refused("[]", "its format is None")
    refused(text[:100], "it is damaged: .*use another checkpoint")
    refused(text.encode().replace(b"value", b"val\xffe"), "it is damaged: .*utf-8")
    refused(text.replace('"value": 1.0', '"value": 1.5'), "it is damaged: its text does not match its sha256")
    refused(text.replace("[6]", "[5]"), "it is damaged: its text does not match its sha256")
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="manifest"):
        CheckpointReader(tmp_path)


def test_tensors_that_do_not_fit_are_all_named_before_any_is_filled(tmp_path: Path) -> None:
    save_numbers(tmp_path, 1, 1.0)
    reader = CheckpointReader(tmp_path)
    good = Chunk("other", (2, 2), (0, 0), torch.zeros(2, 2))
    wrong = [
        Chunk("weight", (7,), (0,), torch.zeros(7)),
        Chunk("weight", (6,), (0,), torch.zeros(6, dtype=torch.float64)),
        *[Chunk(f"no.{number}", (2,), (0,), torch.zeros(2)) for number in range(9)],
    ]
    with pytest.raises(CheckpointError) as caught:
        reader.read_into([good, *wrong])
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'step_0000001'}: it does not fit the model:",
        "  weight has shape (6,), the model needs (7,)",
        "  weight is torch.float32, the model needs torch.float64",
        *[f"  no.{number} is not in it" for number in range(6)],
        "  and 3 more",
    ]
    assert good.tensor.sum() == 0
    with pytest.raises(CheckpointError, match=r"it holds no tensor no\.1"):
        reader.read("no.1")
    reader.read_into([good, wrong[1]], cast=True)
    assert (good.tensor.sum(), wrong[1].tensor.sum()) == (4, 6)


def test_a_file_is_hashed_once_and_only_if_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_aquila.checkpoint import reader as module

    save_numbers(tmp_path, 1, 1.0)
    hashed: list[str] = []
    original = module.file_sha256
    monkeypatch.setattr(module, "file_sha256", lambda path: hashed.append(path.name) or original(path))
    reader = CheckpointReader(tmp_path)
    reader.read_into(numbers(0.0), verify_hash=False)
    assert hashed == []
    reader.read_into(numbers(0.0))
    reader.read("weight")
    reader.verify_files(ParallelContext.single().world)
    assert hashed == ["rank_00000.safetensors"]


def verify_damaged(root: Path) -> str:
    ctx = ParallelContext.create(RankGrid(dp=2), torch.device("cpu"))
    try:
        CheckpointReader(root).verify_files(ctx.world)
    except CheckpointError as error:
        return str(error)
    return "whole"


def test_files_are_verified_together(pool: Pool, tmp_path: Path) -> None:
    pool(4).run(save, {"dp": 4}, tmp_path, "bf16")
    assert pool(2).run(verify_damaged, tmp_path) == ["whole"] * 2
    edit(tmp_path / "step_0000100" / "rank_00003.safetensors", -1)
    for message in pool(2).run(verify_damaged, tmp_path):
        assert "rank_00003.safetensors: it is damaged" in message
        assert message.endswith("(rank 1)")


def test_another_model_is_told_apart(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, numbers(1.0), {"shape": asdict(SHAPE)}, ParallelContext.single())
    reader = CheckpointReader(tmp_path)
    assert reader.shape_problems(replace(SHAPE, padded_vocab_size=128, seq_len=99, init_std=1.0)) == []
    assert reader.shape_problems(replace(SHAPE, num_layers=1, norm_eps=1e-6)) == [
        "num_layers is 2 there, 1 in this run",
        "norm_eps is 1e-05 there, 1e-06 in this run",
    ]
    save_checkpoint(tmp_path, 2, numbers(1.0), {"shape": {"depth": 3}}, ParallelContext.single())
    with pytest.raises(CheckpointError, match=r"manifest.json: its model shape is of another version: .*depth"):
        CheckpointReader(tmp_path).shape()
    save_numbers(tmp_path, 3, 1.0)
    with pytest.raises(CheckpointError, match="its state holds no model shape"):
        CheckpointReader(tmp_path).shape()
