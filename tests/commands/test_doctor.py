"""Real hangs of real processes, and whom the doctor names."""

import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_aquila.commands import doctor
from megatron_aquila.errors import LOST_RANK, CommunicationError
from megatron_aquila.observe.breadcrumbs import Recorder
from megatron_aquila.observe.processes import process_state
from megatron_aquila.observe.trails import read_trails
from megatron_aquila.observe.watch import watched
from megatron_aquila.parallel.collectives import all_gather, all_reduce_
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.pipeline.action import Op
from megatron_aquila.pipeline.wire import P2PWire
from megatron_aquila.plan.grid import RankGrid

WORLD = 3


def work(rank: int, folder: Path, how: str, timeout: float) -> None:
    """Three steps of collectives; rank 2 falls out in the third. A lost rank ends the process with its status."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=limit)
    recorder = Recorder(rank=rank, world=WORLD, attempt="a")
    recorder.keep_in(folder)
    grid = RankGrid(pp=WORLD) if how == "message" else RankGrid(dp=WORLD)
    ctx = ParallelContext.create(grid, torch.device("cpu"), limit, trail=recorder)
    with watched(recorder, folder, seconds=0.3, tell=lambda line: (folder / "told").write_text(line)):
        try:
            for step in range(1, 4):
                recorder.at(step, "train")
                one_step(ctx, how if step == 3 and rank == 2 else "")
                if how == "message":
                    one_message(ctx, is_lost=step == 3)
            recorder.close()
        except CommunicationError as error:
            (folder / f"error_{rank}").write_text(str(error))
            os._exit(LOST_RANK)


def one_step(ctx: ParallelContext, fault: str) -> None:
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "sleep":
        stuck_in_the_data_loader()
    if fault != "skip":
        all_reduce_(torch.zeros(4), ctx.world)
    all_gather(torch.zeros(2, 2), ctx.world)


def one_message(ctx: ParallelContext, *, is_lost: bool) -> None:
    """Rank 0 sends to rank 1, which sends to rank 2; rank 1 forgets its last one."""
    wire = P2PWire(ctx, stage_rank=range(WORLD), activation_shape=(2,), dtype=torch.float32)
    if ctx.rank > 0:
        x = wire.recv(Op.F, ctx.rank, 0)
        if ctx.rank == 1 and is_lost:
            stuck_in_the_data_loader()
    if ctx.rank < 2:
        wire.send(Op.F, ctx.rank + 1, 0, x if ctx.rank else torch.zeros(2))
    wire.flush()


def stuck_in_the_data_loader() -> None:
    time.sleep(60)


@pytest.fixture
def hang(tmp_path: Path) -> Iterator[Any]:
    """``hang(how)`` starts the ranks and returns their processes once all that can wait do."""
    processes: list[BaseProcess] = []
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "megatron_aquila.verify.pool"])

    def start(how: str, timeout: float = 60.0) -> list[BaseProcess]:
        for rank in range(WORLD):
            processes.append(context.Process(target=work, args=(rank, tmp_path, how, timeout)))
            processes[-1].start()
        deadline = time.monotonic() + 40
        while not any((tmp_path / name).exists() for name in ("told", "error_0")):
            assert time.monotonic() < deadline, "nobody noticed"
            time.sleep(0.02)
        return processes

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_a_stopped_rank_is_named_with_what_the_others_wait_for(hang: Any, tmp_path: Path, capsys: Any) -> None:
    processes = hang("stop")
    assert doctor.main(["hang", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert f"rank 2 cannot run: its process {processes[2].pid} is stopped" in told
    assert "it has written no stack: it cannot run" in told
    assert "rank 1 is" not in told
    assert "3 of 3 ranks in step 3 (train); 3 processes live here" in told
    assert f"`aquila doctor hang {tmp_path}`" in (tmp_path / "told").read_text()


def test_a_rank_that_skips_a_collective_is_named(hang: Any, tmp_path: Path, capsys: Any) -> None:
    hang("skip")
    assert doctor.main(["hang", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "ranks differ in world #5: rank 2 does all_gather float32 [2, 2] in step 3 (train)" in told
    assert "but ranks 0, 1 do all_reduce float32 [4] in step 3 (train)" in told
    assert "one_step" in told, "its stack"


def test_a_rank_that_hangs_elsewhere_is_named_with_its_stack(hang: Any, tmp_path: Path, capsys: Any) -> None:
    hang("sleep")
    assert doctor.main(["hang", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "rank 2 is behind: ranks 0, 1 wait since" in told
    assert "in world #5, all_reduce float32 [4] in step 3 (train)" in told
    assert "its stack now:" in told
    assert "in stuck_in_the_data_loader" in told


def test_a_chain_of_waits_is_followed_to_its_end(hang: Any, tmp_path: Path, capsys: Any) -> None:
    hang("message")
    time.sleep(0.2)
    assert doctor.main(["hang", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "rank 1 is behind: rank 2 waits since" in told
    assert "message float32 [2]" in told
    assert "in stuck_in_the_data_loader" in told
    assert "rank 0 is behind" not in told


def test_the_timeout_ends_the_others_and_points_to_the_doctor(hang: Any, tmp_path: Path, capsys: Any) -> None:
    processes = hang("stop", timeout=1.5)
    for process in processes[:2]:
        process.join(20)
        assert process.exitcode == LOST_RANK
    for rank in range(2):
        error = (tmp_path / f"error_{rank}").read_text()
        assert "noticed in world #5, all_reduce in step 3 (train)" in error
        assert f"`aquila doctor hang {tmp_path}` names it" in error
    assert doctor.main(["hang", str(tmp_path)]) == 1
    assert "rank 2 cannot run" in capsys.readouterr().out


def test_a_dead_rank_is_named_while_the_others_live_and_after(hang: Any, tmp_path: Path, capsys: Any) -> None:
    processes = hang("kill")
    for process in processes:
        process.join(20)
    assert "error_0" in os.listdir(tmp_path)
    assert {trail.step for trail in read_trails(tmp_path)} == {3}
    assert doctor.main(["hang", str(tmp_path)]) == 1
    assert "rank 2 is behind: rank" in capsys.readouterr().out


def test_a_run_that_goes_on_is_left_alone(tmp_path: Path, capsys: Any) -> None:
    recorder = Recorder()
    recorder.keep_in(tmp_path)
    assert doctor.main(["hang", str(tmp_path)]) == 0
    assert "no rank holds the others up" in capsys.readouterr().out
    recorder.close()
    doctor.main(["hang", str(tmp_path)])
    assert "the run has ended in order" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert doctor.main(["hang", str(tmp_path)]) == 2
    assert "it holds no breadcrumbs" in capsys.readouterr().err
    assert doctor.main(["fever"]) == 2
    assert doctor.main(["--help"]) == 0


def test_a_process_number_that_another_has_now_is_gone() -> None:
    assert process_state(os.getpid(), 0) == "runs"
    assert process_state(os.getpid(), 1) == "gone"
