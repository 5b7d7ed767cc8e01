"""tyro reads these types as it does those they stand for, without typeguard's import."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tyro

from megatron_aquila.commands.flag_types import NO_WORDS, OptionalNumber, OptionalPath, OptionalText, Words


@dataclass(frozen=True, kw_only=True)
class Plain:
    needed: tuple[str, ...]
    words: tuple[str, ...] = ()
    text: str | None = None
    number: int | None = None
    path: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Quick:
    needed: Words
    words: Words = NO_WORDS
    text: OptionalText = None
    number: OptionalNumber = None
    path: OptionalPath = None


@pytest.mark.parametrize(
    "flags",
    [
        ["--needed", "a"],
        ["--needed"],
        ["--needed", "a", "b", "--words", "c d", "--text", "e", "--number", "3", "--path", "f/g"],
        ["--needed", "a", "--text", "None", "--number", "None", "--words"],
    ],
)
def test_they_are_read_as_the_types_they_stand_for(flags: list[str]) -> None:
    assert vars(tyro.cli(Quick, args=flags)) == vars(tyro.cli(Plain, args=flags))


@pytest.mark.parametrize("flags", [[], ["--needed", "a", "--number", "x"]])
def test_what_is_wrong_is_refused(flags: list[str]) -> None:
    for options in (Quick, Plain):
        with pytest.raises(SystemExit):
            tyro.cli(options, args=flags)


def test_typeguard_is_asked_nothing() -> None:
    code = f"""\
import sys, tyro
from {__name__} import {{options}}
sys.modules.pop("typeguard", None)
tyro.cli({{options}}, args=["--needed", "a"])
print("typeguard" in sys.modules)"""
    for options, asked in (("Quick", "False"), ("Plain", "True")):
        command = [sys.executable, "-c", code.format(options=options)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == [asked]
