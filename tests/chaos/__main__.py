"""``python -m tests.chaos``: real faults in real runs, until as many have come as are asked for, or time is over."""

import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_aquila.verify.page import put, write
from tests.chaos.drill import Drill, Ground, Outcome, small_disk
from tests.chaos.faults import BAD_NUMBERS, KINDS, draw
from tests.chaos.table import PAGE, failures, report

AT_ONCE = 8  # faults that befall one run


@dataclass(frozen=True, kw_only=True)
class Options:
    """Inject faults into runs of two ranks, print what became of them, and write it into docs/reliability.md."""

    injections: int = 200
    minutes: float = 30.0
    """No further run is begun after so long."""
    seed: int = 0
    kinds: tuple[str, ...] = ()
    """Only these classes of faults."""
    launcher: tuple[str, ...] = ("forked", "torchrun", "forked", "forked")
    """How the rounds are started, in turns: every round has each class once."""
    page: bool = True
    """Write the page."""


def rounds(options: Options) -> Iterator[tuple[str, str, list[str]]]:
    """For ever: launcher, layout and classes of one run. Every round of them has each class once, in any order."""
    rng = random.Random(options.seed)
    wanted = options.kinds or tuple(KINDS)
    number = 0
    while True:
        launcher = options.launcher[number % len(options.launcher)]
        layout = ("dp 2", "pp 2")[number // 2 % 2]
        kinds = [kind for kind in wanted if layout == "dp 2" or kind != "flip-weight"]
        rng.shuffle(kinds)
        bad = [kind for kind in kinds if kind in BAD_NUMBERS]
        kinds = [kind for kind in kinds if kind not in BAD_NUMBERS]
        for start in range(0, len(kinds), AT_ONCE):
            yield launcher, layout, kinds[start : start + AT_ONCE]
        if bad:
            yield launcher, layout, bad
        number += 1


def main() -> int:
    """Returns the exit status: 1 where anything was not as it should be."""
    options = tyro.cli(Options, prog="python -m tests.chaos")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is mounted and started goes with it
    rng, began, outcomes = random.Random(options.seed), time.monotonic(), list[Outcome]()
    command, text = " ".join(["python -m tests.chaos", *sys.argv[1:]]), ""
    with tempfile.TemporaryDirectory(prefix="aquila_chaos_") as name:
        ground = Ground.prepare(Path(name) / "ground")
        for number, (launcher, layout, kinds) in enumerate(rounds(options)):
            minutes = (time.monotonic() - began) / 60
            if minutes > options.minutes or sum(outcome.fired for outcome in outcomes) >= options.injections:
                break
            with small_disk(Path(name) / f"run_{number}") as is_small:
                kinds = [kind for kind in kinds if is_small or kind != "full-start"]
                drill = Drill(
                    ground,
                    Path(name) / f"run_{number}",
                    draw(kinds, rng),
                    layout=layout,
                    torchrun=launcher == "torchrun",
                    is_small=is_small,
                )
                found = drill.go()
            outcomes += found
            disk = "a small tmpfs" if is_small else "an error raised at the write call"
            minutes = (time.monotonic() - began) / 60
            text = report(outcomes, command=command, seed=options.seed, minutes=minutes, disk=disk)
            print(
                f"{minutes:.1f} min, {launcher}, {layout}: {', '.join(kinds)}", *failures(found), sep="\n", flush=True
            )
            if options.page:
                write(PAGE, put(PAGE.read_text(encoding="utf-8"), "chaos", text))
    print(text)
    return 1 if failures(outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
