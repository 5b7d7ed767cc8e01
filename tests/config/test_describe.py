from dataclasses import replace

from megatron_aquila.config.cli import load_config
from megatron_aquila.config.derive import derive
from megatron_aquila.config.describe import derived_rows, setting_rows
from megatron_aquila.config.settings import all_settings
from megatron_aquila.train.bubble import run_bubble, run_schedule


def rows_of(config, world):
    derived = derive(config, world)
    order = run_schedule(config, derived)
    return dict(derived_rows(config, derived, order, bubble=run_bubble(derived, order)))


def test_what_follows_from_the_34b_recipe():
    config = load_config(["--preset", "aquila2-34b"], world_size=512).config
    rows = rows_of(config, 512)
    assert rows["ranks"] == "512 = tp 4 x cp 1 x dp 32 x pp 4, sequence parallel"
    assert rows["parameters"].startswith("33,693,554,688 ")
    assert rows["FLOPs per token"] == "207.53 G with causal attention (216.59 G with full attention)"
    assert rows["step"].startswith("1,024 samples = 4,194,304 tokens in 32 microbatches, growing from 32 by 32 ")
    assert rows["layers by stage"].startswith("15 15 16 14; ")
    assert rows["pipeline bubble"] == "12.13 % of a step (8.57 % if all stages were equal), 1f1b with 32 microbatches"
    assert [name for name in rows if name.startswith("memory")] == [f"memory, pp rank {stage}" for stage in range(4)]
    assert rows["memory, pp rank 0"].startswith(
        "26.4 GiB: weights 4.1 GiB, main grads 8.1 GiB, master weights 260 MiB, "
    )
    assert rows["run"] == "488,281,250 samples = 2,000,000,000,000 tokens"
    whole = replace(config, train=replace(config.train, loss_chunk_tokens=0))
    kept = rows_of(whole, 512)
    assert "logits" not in kept["memory, pp rank 0"]
    assert "logits" in kept["memory, pp rank 3"]
    assert "logits" not in rows["memory, pp rank 3"], "a chunk at a time, none of them kept"


def test_chunks_are_told_by_rank():
    flags = ["--preset", "aquila2-34b", "--chunks", "2"]
    config = load_config(flags, world_size=512).config
    rows = rows_of(config, 512)
    assert rows["layers by stage"].startswith("7 7 8 8 8 8 8 6; by rank 7+8 7+8 8+8 8+6; ranks wait 4.6 % ")
    assert rows["pipeline bubble"].endswith(
        " (4.48 % if all stages were equal), 1f1b in 2 chunks a rank with 32 microbatches"
    )


def test_what_differs_from_the_defaults():
    loaded = load_config(["--tp", "2", "--pp", "1"])
    assert setting_rows(loaded, changed_only=True) == [("parallel.tensor", "2", "flag --tp")]
    assert len(setting_rows(loaded)) == len(all_settings())
    assert ("parallel.pipeline", "1", "flag --pp") in setting_rows(loaded)


def test_uneven_replicas_are_told_with_the_memory_of_each_size():
    argv = ["--preset", "aquila2-34b", "--gbs", "96", "--rampup-batch", "none", "--micro-batch-per-dp"]
    config = load_config([*argv, *["2"] * 15, "1", "1"], world_size=272).config
    rows = rows_of(config, 272)
    assert rows["step"] == "96 samples = 393,216 tokens in 3 microbatches of 2 samples on dp ranks 0-14, 1 on 15-16"
    memory = [name for name in rows if name.startswith("memory")]
    assert memory[:3] == [
        "memory, pp rank 0, 2 at once",
        "memory, pp rank 0, 1 at once",
        "memory, pp rank 1, 2 at once",
    ]
    assert len(memory) == 8


def test_how_a_sample_is_shared_is_said():
    config = load_config(["--preset", "aquila2-34b", "--cp", "2", "--cp-method", "ulysses"], world_size=512).config
    rows = rows_of(config, 512)
    assert rows["ranks"] == "512 = tp 4 x cp 2 x dp 16 x pp 4, ulysses attention over cp, sequence parallel"
