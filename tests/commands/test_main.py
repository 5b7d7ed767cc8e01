import subprocess
import sys

import pytest

from megatron_aquila import __main__ as aquila
from megatron_aquila import __version__


def test_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert aquila.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in aquila.COMMANDS)
    assert aquila.main([]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert aquila.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron_aquila {__version__}\n"


def test_usage_promises_no_more_than_there_is() -> None:
    assert aquila.COMMANDS["tokenizer"] == "train, compare and extend tokenizers"
    assert aquila.COMMANDS["convert"] == "turn weights of one form into another, or inspect a checkpoint"


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert aquila.main(["pretrian"]) == 2
    assert "did you mean pretrain?" in capsys.readouterr().err


def test_every_command_has_a_module_with_main() -> None:
    for name in aquila.COMMANDS:
        module = __import__(f"megatron_aquila.commands.{name}", fromlist=["main"])
        assert callable(module.main), name


def test_wrong_settings_answer_without_importing_torch() -> None:
    code = (
        "import sys; from megatron_aquila.__main__ import main; "
        "status = main(['pretrain', '--tp', '3', '--pp', '7', '--no-such-flag']); "
        "print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
    assert "--tp 3" in done.stderr
    assert "--no-such-flag" in done.stderr
    assert "--data-path: no tokens to train on" in done.stderr
