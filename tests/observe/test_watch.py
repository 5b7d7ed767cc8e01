"""A rank that does nothing says so once, with its stack, and answers when it is asked."""

import os
import time
from pathlib import Path

from megatron_aquila.observe.breadcrumbs import Recorder
from megatron_aquila.observe.watch import DUMP_SIGNAL, last_stack, watched


def wait_for(path: Path, words: str) -> str:
    deadline = time.monotonic() + 30
    while words not in (text := path.read_text()):
        assert time.monotonic() < deadline, text
        time.sleep(0.01)
    return text


def test_an_idle_rank_dumps_once_and_only_the_first_two_of_several_tell(tmp_path: Path) -> None:
    for rank, world, tells in ((0, 1, 0), (1, 4, 1), (2, 4, 0)):
        told: list[str] = []
        recorder = Recorder(rank=rank, world=world)
        recorder.keep_in(tmp_path)
        with watched(recorder, tmp_path, seconds=0.05, tell=told.append):
            stack = tmp_path / "breadcrumbs" / f"rank_0000{rank}.stack"
            text = wait_for(stack, "\n\n")
            time.sleep(0.1)
            assert stack.read_text().count("s without a transfer") == 1, "one hang, one dump"
            assert "in wait_for" in last_stack(text), "the main thread's"
        assert len(told) == tells


def test_it_answers_the_signal(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.keep_in(tmp_path)
    with watched(recorder, tmp_path, seconds=1000):
        os.kill(os.getpid(), DUMP_SIGNAL)
        text = wait_for(tmp_path / "breadcrumbs" / "rank_00000.stack", "(most recent call first)")
    assert "test_it_answers_the_signal" in last_stack(text)


def test_without_a_dump_there_is_no_stack() -> None:
    assert last_stack("") == last_stack("--- 2026, 3 s without a transfer\n") == ""
