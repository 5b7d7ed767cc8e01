"""Order, errors and deaths of the worker processes."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_aquila.data.workers import AHEAD, QUIET, beside, kept_for_good, ordered_map
from megatron_aquila.errors import DataError

here = os.getpid()


def act(item: int, tell: Callable[[object], None]) -> int:
    """Items below 100 are squared, late ones first; the others misbehave."""
    if item == 100:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 101:
        os._exit(3)
    if item == 102:
        raise ZeroDivisionError("in a worker")
    if item == 103:
        time.sleep(60)
    tell(-item)
    time.sleep(0.02 if item % 2 == 0 else 0)
    return item * item


def nothing(_: object) -> None:
    pass


def test_results_in_order_and_bounded() -> None:
    taken, told = [], []

    def items() -> Iterator[int]:
        for item in range(20):
            taken.append(item)
            yield item

    results = ordered_map(act, items(), workers=2, tell=told.append)
    for number in range(20):
        assert next(results) == number * number
        assert len(taken) <= number + 2 * AHEAD + 1, "the input is read no further ahead than promised"
    assert list(results) == []
    assert sorted(told) == sorted(-item for item in range(20))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_back(workers: int) -> None:
    with pytest.raises(ZeroDivisionError):
        list(ordered_map(act, [1, 102, 2], workers=workers, tell=nothing))


@pytest.mark.parametrize(("item", "status"), [(100, "killed by SIGKILL"), (101, "exit status 3")])
def test_a_death_is_reported_while_an_earlier_item_is_under_way(item: int, status: str) -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match=rf"worker \d+ died, {status}.*fewer --workers; what was finished is kept"):
        list(ordered_map(act, [103, item, *range(20)], workers=2, tell=nothing))
    assert time.monotonic() - started < 20


def test_an_error_is_told_that_came_before_anybody_asked() -> None:
    def slow() -> Iterator[int]:
        yield from (103, 102)
        time.sleep(1)  # in which the second has failed, the first not ended
        yield 1

    started = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        list(ordered_map(act, slow(), workers=2, tell=nothing))
    assert time.monotonic() - started < 40


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_teller_is_no_death_and_no_wait(workers: int) -> None:
    """As when the progress goes to a closed terminal or a full disk."""

    def closed(_: object) -> None:
        raise BrokenPipeError("nobody listens")

    with pytest.raises(BrokenPipeError, match="nobody listens"):
        list(ordered_map(act, range(8), workers=workers, tell=closed))


def test_the_tokenizers_librarys_threads_are_this_processs_own_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("true", None):
        if value is None:
            monkeypatch.delenv(QUIET)
        else:
            monkeypatch.setenv(QUIET, value)
        assert list(ordered_map(act, [1, 2], workers=2, tell=nothing)) == [1, 4]
        assert os.environ.get(QUIET) == value


def test_workers_end_with_a_killed_parent() -> None:
    """Each holds copies of older workers' pipes, which it must let go."""
    code = (
        "import os, sys; sys.path.insert(0, '.')\n"
        "from megatron_aquila.data.workers import ordered_map\n"
        "def act(item, tell): tell(os.getpid())\n"
        "results = ordered_map(act, range(50), workers=3, tell=lambda pid: os.write(1, b'%d\\n' % pid))\n"
        "[next(results) for _ in range(30)]; os.write(1, b'ready\\n'); sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as parent:
        assert parent.stdout is not None
        pids = {int(line) for line in iter(parent.stdout.readline, "ready\n")}
        assert pids
        parent.kill()
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, f"of {pids} some still run"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    """A process that has ended stays in /proc as a zombie until its new parent, init, has taken note."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_no_garbage_is_looked_for_in_what_is_kept_for_good() -> None:
    with kept_for_good():
        assert not gc.isenabled()
        made: list[list[int]] = [[], []]
    assert gc.isenabled()
    assert not any(found is made for found in gc.get_objects())
    gc.unfreeze()


def test_beside_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with beside(lambda: "there" if os.getpid() != here else "here") as result:
        assert result() == "there"
    monkeypatch.setattr(sys, "platform", "other")
    with beside(lambda: "there" if os.getpid() != here else "here") as result:
        assert result() == "here"


@pytest.mark.parametrize("end", [lambda: 1 / 0, lambda: os._exit(3)], ids=["raises", "dies"])
def test_what_fails_beside_is_done_here(end: Callable[[], object]) -> None:
    with beside(lambda: "here" if os.getpid() == here else end()) as result:
        assert result() == "here"
    with beside(lambda: 1 / 0) as result, pytest.raises(ZeroDivisionError):
        result()


def test_what_is_beside_ends_with_an_error_here() -> None:
    before = multiprocessing.active_children()
    with pytest.raises(ZeroDivisionError), beside(lambda: time.sleep(600)):
        1 / 0  # noqa: B018
    assert multiprocessing.active_children() == before
