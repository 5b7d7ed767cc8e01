"""The recipes resolve, and their pages hold the planner's numbers."""

import re
import subprocess
from pathlib import Path

import pytest

from megatron_aquila.config.cli import load_config
from megatron_aquila.config.derive import derive, memory_plan
from megatron_aquila.errors import ConfigError
from megatron_aquila.pipeline.schedules import build_schedule
from megatron_aquila.plan.flops import flops_per_token, num_params
from megatron_aquila.train.bubble import run_bubble, run_schedule

EXAMPLES = Path(__file__).parents[2] / "examples"
LAYOUTS = {
    "aquila2_7b": [(96, []), (8, ["--zero", "2"]), (8, ["--tp", "2"]), (8, ["--tp", "4", "--pp", "2"])],
    "aquila2_34b": [(512, []), (128, [])],
}


def resolve(recipe, world_size, flags):
    config = load_config(["--config", str(EXAMPLES / recipe / "pretrain.yaml"), *flags], world_size=world_size).config
    return config, derive(config, world_size)


@pytest.mark.parametrize("recipe", LAYOUTS)
def test_the_page_holds_the_numbers_of_the_plan(recipe):
    page = (EXAMPLES / recipe / "README.md").read_text()
    _, derived = resolve(recipe, *LAYOUTS[recipe][0])
    assert f"{num_params(derived.shape):,} parameters" in page
    for attention in ("causal", "full"):
        assert f"{flops_per_token(derived.shape, attention) / 1e9:.5g} G" in page


@pytest.mark.parametrize(
    ("recipe", "layout"), [(recipe, layout) for recipe, all_ in LAYOUTS.items() for layout in all_]
)
def test_each_layout_of_the_table_is_as_planned(recipe, layout):
    config, derived = resolve(recipe, *layout)
    grid = derived.grid
    page = (EXAMPLES / recipe / "README.md").read_text()
    name = f"| {grid.world_size} | tp {grid.tp} x pp {grid.pp} x dp {grid.dp}"
    (row,) = [line for line in page.splitlines() if line.startswith(name)]
    order = run_schedule(config, derived)
    memory = memory_plan(config, derived, order).peak().total
    assert f"| {memory / 2**30:.1f} GiB |" in row
    assert f"| {' '.join(str(len(layers)) for layers in derived.stages.layers)} |" in row
    bubble = run_bubble(derived, order)
    assert ("none |" if grid.pp == 1 else f"| {100 * bubble.own:.2f} % | {100 * bubble.equal:.2f} % |") in row


def test_the_first_steps_of_the_34b_have_one_microbatch():
    config, derived = resolve("aquila2_34b", 512, [])
    assert derived.batch_at(0) == (32, 1)
    bubble = run_bubble(derived, build_schedule(config.parallel.schedule, 4, 1, 1))
    page = " ".join((EXAMPLES / "aquila2_34b" / "README.md").read_text().split())
    assert bubble.own == pytest.approx(bubble.equal)
    assert f"a bubble of {100 * bubble.own:.2f} %, whatever the stages" in page


@pytest.mark.parametrize("recipe", LAYOUTS)
def test_the_scripts_pass_on_what_they_are_given(recipe, tmp_path):
    """With an interpreter that only prints its arguments; a name with a blank stays one word."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "OUTPUT_PREFIX": str(tmp_path / "a b" / "text")}
    script = EXAMPLES / recipe / "preprocess.sh"
    told = subprocess.run(
        [script, "one file.jsonl"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "<one file.jsonl>" in told
    assert f"<{tmp_path}/a b/text>" in told
    assert subprocess.run([script], env=environment, capture_output=True, check=False).returncode == 2

    save = tmp_path / "check points"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "SAVE": str(save), "NNODES": "2", "NODE_RANK": "1"}
    script = EXAMPLES / recipe / "pretrain.sh"
    told = subprocess.run([script, "--lr", "1"], env=environment, capture_output=True, text=True, check=True).stdout
    words = re.findall("<(.*?)>", told)
    assert words[:7] == ["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", "1", "--nproc-per-node"]
    assert words[-4:] == ["--save", str(save), "--lr", "1"]


@pytest.mark.parametrize("recipe", LAYOUTS)
def test_a_recipe_goes_on_where_it_was_stopped(recipe):
    config, _ = resolve(recipe, *LAYOUTS[recipe][0])
    assert config.checkpoint.resume
    assert config.checkpoint.load is None


def test_the_commands_of_the_7b_are_accepted(monkeypatch):
    """Those of the page as they stand, the continuation's among them; without its weights that one is refused."""
    monkeypatch.chdir(EXAMPLES.parent)
    page = (EXAMPLES / "aquila2_7b" / "README.md").read_text().replace("\\\n", " ")
    commands = [line.partition("pretrain_aquila.py ")[2].split() for line in page.splitlines() if "torchrun" in line]
    assert len(commands) == 2
    for flags in commands:
        load_config(flags, world_size=8, to_train=True)
    with pytest.raises(ConfigError, match="continues published weights"):
        load_config([*commands[1], "--init-from-hf", "none"], world_size=8, to_train=True)


@pytest.mark.parametrize("page", ["README.md", "README_zh.md", "examples/aquila2_7b/README.md"])
def test_the_command_for_one_node_is_planned_as_the_page_says(page, monkeypatch):
    """It fits the GPU, saves soon and in one copy, and validates on documents that are not trained on."""
    monkeypatch.chdir(EXAMPLES.parent)
    text = Path(page).read_text(encoding="utf-8").replace("\\\n", " ")
    command = next(line for line in text.splitlines() if line.startswith("torchrun --nproc-per-node 8"))
    config = load_config(command.partition("pretrain_aquila.py ")[2].split(), world_size=8, to_train=True).config
    derived = derive(config, 8)
    memory = memory_plan(config, derived, run_schedule(config, derived)).peak()
    assert f"{memory.total / 2**30:.1f} GiB" in text
    assert memory.total < 0.7 * 80e9
    tokens = config.train.global_batch * config.model.seq_len
    assert round(config.checkpoint.save_interval * tokens / 1e6) == 105
    assert round(config.train.train_samples * config.model.seq_len / 1e9) == 10
    share = memory.master_weights + memory.optimizer_states + memory.weights / 8
    assert share < config.checkpoint.save_staging_gib * 2**30
    assert config.train.eval_iters > 0
    assert config.data.split == "99,1,0"
