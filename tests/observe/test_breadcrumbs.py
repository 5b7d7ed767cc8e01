"""What a rank leaves behind, and that any bytes are read as a trail or refused."""

import math
import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_aquila.errors import RunFolderError
from megatron_aquila.observe import breadcrumbs
from megatron_aquila.observe.breadcrumbs import CAPACITY, CHANNEL, FILE_BYTES, FIRST_RECORD, HEADER, RECORD, Recorder
from megatron_aquila.observe.trails import RankTrail, read_trail, read_trails


def tensor(*shape: int, dtype: str = "torch.float32") -> Any:
    return SimpleNamespace(shape=shape, dtype=dtype, nbytes=4 * math.prod(shape))


def recorder(folder: Path, **who: Any) -> Recorder:
    made = Recorder(attempt="a", **who)
    made.keep_in(folder)
    return made


def trail(folder: Path, rank: int = 0) -> RankTrail:
    return read_trail(folder / "breadcrumbs" / breadcrumbs.file_name(rank))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    one = Recorder(rank=3, world=8, attempt="a")
    early = one.group("tp", (2, 3))
    early.ends(early.begin("all_gather", tensor(5), link=None, waits=True))
    one.keep_in(tmp_path)  # what was noted before the folder was known is kept
    one.at(7, "train")
    late = early.begin("all_reduce", tensor(2, 3, 4, 5, 6, dtype="torch.bfloat16"), link=None, waits=False)
    early.begin("send", tensor(), link=(3, 4), waits=False)
    early.waits(late)
    found = trail(tmp_path, 3)
    assert (found.rank, found.world, found.pid, found.step, found.phase) == (3, 8, os.getpid(), 7, "train")
    group, link = found.channels.values()
    assert (group.name, group.size, group.begun, group.link) == ("tp", 2, 2, None)
    assert (link.name, link.size, link.begun, link.link) == ("tp 3>4", 2, 1, (3, 4))
    first, second, third = found.crumbs.values()
    assert first.what() == "all_gather float32 [5] in step 0 (start)"
    assert first.ended is not None
    assert second.what() == "all_reduce bfloat16 [2, 3, 4, 5] in step 7 (train)"
    assert second.num_bytes == 2880
    assert found.waiting == second
    assert found.newest == third
    assert found.last == second.waits_since
    early.ends(late)
    assert trail(tmp_path, 3).waiting is None
    assert one.waited > 0
    one.close()
    assert trail(tmp_path, 3).has_ended


def test_the_ring_keeps_the_newest_and_an_overtaken_record_is_left_alone(tmp_path: Path) -> None:
    group = recorder(tmp_path).group("dp", (0, 1))
    old = group.begin("all_reduce", tensor(1), link=None, waits=False)
    for _ in range(CAPACITY):
        new = group.begin("all_reduce", tensor(1), link=None, waits=False)
    group.waits(old)
    group.ends(old)
    found = trail(tmp_path)
    assert len(found.crumbs) == CAPACITY
    assert all(crumb.ended is None and crumb.waits_since is None for crumb in found.crumbs.values())
    assert found.newest is not None
    assert found.newest.sequence == new == CAPACITY + 1


def dies(folder: Path) -> None:
    group = recorder(folder).group("world", (0, 1))
    group.begin("all_reduce", tensor(9), link=None, waits=True)
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_trail_outlives_sigkill(tmp_path: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=dies, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    waiting = trail(tmp_path).waiting
    assert waiting is not None
    assert waiting.what() == "all_reduce float32 [9] in step 0 (start)"


def test_a_new_attempt_keeps_the_trail_of_the_one_before_and_counts_alone(tmp_path: Path) -> None:
    recorder(tmp_path, rank=1, world=2)
    for rank in range(2):
        Recorder(rank=rank, world=2, attempt="b").keep_in(tmp_path)
    assert [one.attempt for one in read_trails(tmp_path)] == ["b", "b"]
    assert (tmp_path / "breadcrumbs" / "rank_00001.previous").stat().st_size == FILE_BYTES
    Recorder(rank=0, world=1, attempt="c").keep_in(tmp_path)
    assert [one.rank for one in read_trails(tmp_path)] == [0]


def test_an_error_names_the_transfer_and_the_way_on(tmp_path: Path) -> None:
    one = Recorder()
    group = one.group("tp", (0, 1))
    ticket = group.begin("all_gather", tensor(5), link=None, waits=True)
    assert "all_gather in step 0 (start)" in group.lost(ticket)
    assert "--save or --log-dir" in group.lost(ticket)
    one.keep_in(tmp_path)
    assert f"aquila doctor hang {tmp_path}" in group.lost(ticket)


def test_there_is_room_for_so_many_channels() -> None:
    one = Recorder()
    for number in range(breadcrumbs.SLOTS):
        one.group(f"g{number}", (0, 1))
    with pytest.raises(AssertionError, match="room for 256"):
        one.group("more", (0, 1))


def test_a_folder_without_breadcrumbs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no breadcrumbs"):
        read_trails(tmp_path)
    with pytest.raises(RunFolderError, match="No such file"):
        trail(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"AQCRUMB1", bytes(FILE_BYTES), b"x" * FILE_BYTES])
def test_other_bytes_are_refused(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(damage)
    with pytest.raises(RunFolderError, match="no breadcrumbs of this version"):
        read_trail(path)


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(breadcrumbs.MAGIC + b"\xff" * (FILE_BYTES - 8))
    with pytest.raises(RunFolderError, match="header is damaged"):
        read_trail(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.data())
def test_any_damage_gives_a_trail_or_a_typed_error(tmp_path: Path, data: st.DataObject) -> None:
    if not (tmp_path / "breadcrumbs").exists():
        group = recorder(tmp_path, rank=1, world=2).group("tp", (0, 1))
        for _ in range(20):
            group.begin("all_reduce", tensor(3), link=None, waits=True)
    raw = bytearray((tmp_path / "breadcrumbs" / breadcrumbs.file_name(1)).read_bytes())
    regions = st.sampled_from([0, 512, FIRST_RECORD, FIRST_RECORD + RECORD.size])
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(regions) + data.draw(st.integers(0, HEADER.size))
        junk = data.draw(st.binary(min_size=1, max_size=CHANNEL.size))
        raw[at : at + len(junk)] = junk
    path = tmp_path / "damaged.bin"
    path.write_bytes(bytes(raw[: data.draw(st.sampled_from([FILE_BYTES, FILE_BYTES, FILE_BYTES, 100]))]))
    try:
        found = read_trail(path)
    except RunFolderError:
        return
    assert found.waiting is None or found.waiting.what()


def test_a_full_disk_is_an_error_and_not_a_sigbus_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with holes can be mapped on a full disk; whoever writes into the holes dies."""
    recorder = Recorder()
    recorder.keep_in(tmp_path)
    file = tmp_path / "breadcrumbs" / "rank_00000.bin"
    assert file.stat().st_blocks * 512 >= file.stat().st_size

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Recorder().keep_in(tmp_path)
