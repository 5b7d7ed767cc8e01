"""``aquila selftest resume``: prove on the user's own settings that stopping and resuming changes no bit."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tyro

from megatron_aquila.commands.failure import exit_code
from megatron_aquila.config.cli import load_config, with_config_flag
from megatron_aquila.errors import ConfigError, Problem
from megatron_aquila.verify.layout import requested_layout
from megatron_aquila.verify.resume import Kind, prove_resume, small_run

USAGE = """usage: aquila selftest resume [CONFIG.yaml] [FLAGS] [--steps N]
  the settings, made small: are 2 N steps without a stop, and N steps, a save, new processes and N steps, bit-equal?"""
STEPS = 2


def _option(name: str, help: str) -> Any:
    return tyro.conf.arg(name=name, help=help, help_behavior_hint="")


class SelftestOptions(TypedDict, total=False):
    """Of this command only."""

    steps: Annotated[int, _option("steps", f"steps before and after the stop; default {STEPS}")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``aquila selftest``; returns 0 only if every bit is equal."""
    match list(sys.argv[1:] if argv is None else argv):
        case ["resume", *rest]:
            return resume(rest)
        case ["--help" | "-h"]:
            print(USAGE)
            return 0
    print(USAGE, file=sys.stderr)
    return 2


def resume(argv: Sequence[str]) -> int:
    """Shrink the given config, run it in both ways, print the digests of both."""
    with exit_code() as code:
        loaded = load_config(
            with_config_flag(argv), prog="aquila selftest resume [CONFIG.yaml]", options=SelftestOptions
        )
        steps = loaded.options.get("steps", STEPS)
        if steps < 1:
            raise ConfigError([Problem("--steps", steps, "there is nothing to stop", "use 1 or more")])
        with tempfile.TemporaryDirectory(prefix="aquila_selftest_") as folder:
            small = small_run(loaded.config, Path(folder), steps=steps)
            layout = requested_layout(loaded.config)
            print(f"{layout}, {small.train.precision}, {small.model.num_layers} layers, {steps} + {steps} steps")
            kinds = prove_resume(small)
        print(*(line for kind in kinds for line in lines(kind)), sep="\n")
        code.value = 0 if all(kind.holds for kind in kinds) else 1
        print("every bit is equal" if code.value == 0 else "the resumed run is ANOTHER run")
    return code.value


def lines(kind: Kind) -> list[str]:
    """The digests of both runs, one below the other."""
    verdict = "equal" if kind.holds else f"DIFFERS, first: {kind.first_difference}"
    return [f"{kind.name:<18} whole    {kind.whole}", f"{'':<18} resumed  {kind.resumed}  {verdict}"]
