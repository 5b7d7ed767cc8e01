"""The planner's figures in docs/memory.md and docs/heterogeneous.md are what it says of the settings there."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_aquila.config.cli import load_config
from megatron_aquila.config.derive import Derived, derive, memory_plan
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.plan.memory import MemoryPlan
from megatron_aquila.train.bubble import run_schedule
from tests.verify.test_dry_uneven import CHIPS_70B, REPLICAS_34B, STAGES_34B, STAGES_70B

DOCS = Path(__file__).parents[2] / "docs"
MEMORY = (DOCS / "memory.md").read_text(encoding="utf-8")
MIXED = (DOCS / "heterogeneous.md").read_text(encoding="utf-8")
GIB = 2**30
ONE_RANK = "--preset aquila2-7b --micro-batch 4 --global-batch 4"
RUNS = {
    "7B, dp 8": ("--preset aquila2-7b", 8),
    "7B on one rank, 4 x 2,048 tokens": (ONE_RANK, 1),
    "34B, 512 ranks (tp 4, pp 4, dp 32)": ("--preset aquila2-34b", 512),
}


def resolved(words: str, world: int) -> tuple[RunConfig, Derived]:
    config = load_config(words.split(), world_size=world).config
    return config, derive(config, world)


def planned(words: str, world: int, micro_batch: int | None = None) -> MemoryPlan:
    config, derived = resolved(words, world)
    return memory_plan(config, derived, run_schedule(config, derived), micro_batch=micro_batch)


def rows_below(page: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a line that begins so; an empty first cell is that of the row before."""
    below = page[page.index(f"\n{heading}") :]
    lines = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    assert lines is not None, f"there is a table below {heading}"
    rows = [re.findall(r" ([^|]*?) ?(?=\|)", line) for line in lines[0].splitlines()[2:]]
    for before, row in pairwise(rows):
        row[0] = row[0] or before[0]
    return rows


def gib(size: int, digits: int = 1) -> str:
    return f"{size / GIB:.{digits}f}" if size else "0"


def recomputations() -> list[tuple[list[str], str]]:
    """The rows of the table of recomputation, each with its flags: with a blank before them, beside the kind above."""
    kind, found = "", []
    for row in rows_below(MEMORY, "## Activations"):
        flags = row[0].strip("`")
        kind = kind if flags.startswith(" ") else flags
        found.append((row, kind + flags if flags.startswith(" ") else flags))
    return found


@pytest.mark.parametrize(("row", "flags"), recomputations(), ids=lambda value: value if isinstance(value, str) else "")
def test_activations_by_recomputation(row: list[str], flags: str) -> None:
    small = planned(f"--preset aquila2-7b --micro-batch 1 --global-batch 4 {flags}", 1)
    large = planned(f"--preset aquila2-34b {flags}", 512)
    found = [f"{plan.activations_of_rank(0) / GIB:.2f}" for plan in (small, large)]
    assert row[3:5] == found


def test_the_stages_of_that_table_are_the_recipes() -> None:
    _, derived = resolved("--preset aquila2-34b", 512)
    assert f"stages {' '.join(str(len(layers)) for layers in derived.stages.layers)}," in MEMORY


@pytest.mark.parametrize("row", rows_below(MEMORY, "## Weights"), ids=lambda row: row[0])
def test_states(row: list[str]) -> None:
    narrow = {"(none)": "", "both": "--master-weights remainder --moments-dtype bf16"}
    words = f"{ONE_RANK} {narrow.get(row[0], row[0].strip('`'))}"
    memory = planned(words, 1).of_rank(0)
    states = memory.weights + memory.main_grads + memory.master_weights + memory.optimizer_states
    assert row[6:] == [gib(states), gib(memory.total)]


@pytest.mark.parametrize("row", rows_below(MEMORY, "## Sharded gradients"), ids=lambda row: f"{row[0]} {row[1]}")
def test_shards(row: list[str]) -> None:
    words, world = RUNS[row[0]]
    plan = planned(f"{words} --zero {row[1]}", world)
    memory = max((plan.of_rank(rank) for rank in range(plan.grid.pp)), key=lambda memory: memory.total)
    states = memory.master_weights + memory.optimizer_states
    parts = (memory.weights, memory.main_grads, states, memory.activations, memory.total)
    assert row[2:] == [gib(part) for part in parts]


@pytest.mark.parametrize("row", rows_below(MEMORY, "| 34B, 512 ranks (dp 32), pp rank 0"), ids=lambda row: row[0])
def test_shards_within_groups(row: list[str]) -> None:
    memory = planned(f"--preset aquila2-34b {row[0].strip('`')}", 512).of_rank(0)
    states = memory.master_weights + memory.optimizer_states
    assert row[1:5] == [gib(part) for part in (memory.weights, memory.main_grads, states, memory.total)]


@pytest.mark.parametrize(
    "row", rows_below(MEMORY, "### Activations on the host"), ids=lambda row: f"{row[0]} {row[1]} {row[2]}"
)
def test_activations_on_the_host(row: list[str]) -> None:
    words, world = RUNS[row[0]]
    plan = planned(f"{words} --recompute {row[1]} --offload-activations {row[2]}", world)
    ranks = range(plan.grid.pp)
    activations = max(plan.activations_of_rank(rank) for rank in ranks)
    total = max(plan.of_rank(rank).total for rank in ranks)
    host = max(plan.host_of_rank(rank).total for rank in ranks)
    assert row[3:6] == [f"{activations / GIB:.1f}", gib(total), gib(host)]


def test_long_samples() -> None:
    page = (DOCS / "context-parallel.md").read_text(encoding="utf-8")
    shown = re.findall(r"^aquila pretrain (.*?) \.\.\.", page, re.MULTILINE)
    assert [" --recompute full" in words for words in shown] == [False, True]
    kept = shown[1].replace(" --recompute full", "")
    first, second, third = (fullest(words, 512) for words in (*shown, kept))
    assert f"the first takes {first} GiB" in page
    assert f"The second takes {second};" in page
    assert f"it would take {third}," in page


def fullest(words: str, world: int, micro_batch: int | None = None) -> str:
    return gib(planned(words, world, micro_batch).peak().total)


def test_mixed_clusters() -> None:
    rows = [row[2] for row in rows_below(MIXED, "## FlagScale's recipes")]
    again, kept = fullest(STAGES_34B, 512), fullest("--preset aquila2-34b --stage-layers 15 15 15 15", 512)
    two, one = (fullest(REPLICAS_34B, 384, size) for size in (2, 1))
    chips = planned(f"{CHIPS_70B} 0", 88)
    short, long = (gib(max(chips.of_rank(rank).total for rank in ranks)) for ranks in (range(20), (20, 21)))
    assert rows == [
        f"up to {again} GiB; {kept} without recomputation",
        f"{two} GiB with 2 samples, {one} with 1",
        f"up to {fullest(STAGES_70B, 512)} GiB",
        f"{short} GiB on the short stages, {long} on the long ones",
    ]
    assert f"it is {fullest(f'{CHIPS_70B} 1', 88)} GiB" in MIXED
