import os
import signal
import subprocess
import sys

import pytest

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.errors import (
    DRIFTED,
    LOST_RANK,
    CommunicationError,
    ConfigError,
    DataError,
    Problem,
    ReplicaError,
    Stopped,
)


def test_success_is_zero() -> None:
    with exit_code() as code:
        pass
    assert code.value == 0


def test_problems_of_the_settings_are_printed_by_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    error = ConfigError(
        [Problem("--tp", 3, "32 heads do not divide", "use 4"), Problem("--pp", 9, "8 layers", "use 8")]
    )
    error.is_shared = True
    for rank in (0, 1):
        with exit_code(rank=rank) as code:
            raise error
        assert code.value == 2
    err = capsys.readouterr().err
    assert err.count("--tp 3: 32 heads do not divide; use 4") == 1
    assert err.count("--pp 9") == 1


def test_other_errors_name_their_rank(capsys: pytest.CaptureFixture[str]) -> None:
    with exit_code(rank=3) as code:
        raise DataError("a.bin is cut")
    assert code.value == 2
    assert capsys.readouterr().err == "rank 3: error: a.bin is cut\n"


def test_an_interrupt_is_130_and_our_own_mistakes_keep_their_traceback() -> None:
    with exit_code() as code:
        raise KeyboardInterrupt
    assert code.value == 130
    with pytest.raises(AssertionError), exit_code():
        raise AssertionError("ours")


def test_a_lost_rank_has_a_status_so_that_a_launcher_starts_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with exit_code(rank=5) as code:
        raise CommunicationError("another rank is gone")
    assert code.value == LOST_RANK == 3
    assert capsys.readouterr().err == "rank 5: error: another rank is gone\n"


def test_drifted_replicas_are_said_once_and_have_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        with exit_code(rank=rank) as code:
            raise ReplicaError("replicas have drifted apart")
        assert code.value == DRIFTED == 4
    assert capsys.readouterr().err == "error: replicas have drifted apart\n"


def test_a_stop_before_training_leaves_with_the_signals_status(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        with exit_code(rank=rank) as code:
            raise Stopped(signal.SIGTERM)
        assert code.value == 143
    assert capsys.readouterr().err == "stopped by SIGTERM before the first step: there is nothing to save\n"


def test_a_reader_that_went_away_ends_a_command_without_a_word() -> None:
    code = (
        "import sys\n"
        "from megatron_aquila.commands.failure import exit_code\n"
        "with exit_code() as code:\n"
        "    print('x')\n"
        "sys.exit(code.value)"
    )
    reader, writer = os.pipe()
    os.close(reader)
    told = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (told.returncode, told.stderr) == (141, b"")


def test_a_pipe_of_something_else_is_our_own_mistake() -> None:
    with pytest.raises(BrokenPipeError, match="of a worker"), exit_code():
        raise BrokenPipeError("of a worker")
