from dataclasses import replace

import pytest

from megatron_aquila.observe.meters import GIB, ThroughputMeter
from megatron_aquila.observe.report import StepReport

REPORT = StepReport(
    step=1,
    consumed_samples=8,
    global_batch=8,
    num_tokens=8000,
    computed_tokens=8192,
    loss=2.5,
    grad_norm=0.75,
    loss_scale=1.0,
    lr=1e-4,
    applied=True,
    seconds=2.0,
    data_seconds=0.125,
    memory_bytes=3 * GIB,
    source_loss={"zh": 2.0},
)


def meter(**settings):
    settings = {"flops_per_token": 6e9, "flops_per_token_full": 7e9, "num_devices": 4, "total_samples": 80} | settings
    return ThroughputMeter(**settings)


def test_every_figure_of_a_step():
    row = meter(peak_flops=312e12, clock=lambda: 2.0).row(REPORT)
    assert row == {
        "step": 1,
        "consumed_samples": 8,
        "batch_size": 8,
        "num_tokens": 8000,
        "loss": 2.5,
        "grad_norm": 0.75,
        "lr": 1e-4,
        "loss_scale": 1.0,
        "applied": 1,
        "seconds": 2.0,
        "data_seconds": 0.125,
        "tokens_per_second": 4096.0,
        "tokens_per_second_per_device": 1024.0,
        "tflops_per_device": pytest.approx(6.144),
        "memory_gib": 3.0,
        "seconds_left": 18.0,
        "mfu": pytest.approx(6.144 / 312),
        "mfu_full_attention": pytest.approx(7.168 / 312),
        "loss/zh": 2.0,
    }


def test_hfu_counts_what_is_recomputed_and_mfu_does_not():
    plain = meter(peak_flops=312e12, attention_flops_per_token=1e9)
    again = {"recomputed_flops_per_token": 2e9, "recomputed_attention_flops_per_token": 0.5e9}
    recomputing = meter(peak_flops=312e12, attention_flops_per_token=1e9, **again)
    halved = replace(REPORT, attention_share=0.5)
    assert "hfu" not in plain.row(REPORT)
    assert recomputing.row(REPORT)["mfu"] == plain.row(REPORT)["mfu"]
    assert recomputing.row(REPORT)["hfu"] == pytest.approx(1024 * 8e9 / 312e12)
    assert recomputing.row(halved)["hfu"] == pytest.approx(1024 * (5.5e9 + 1.75e9) / 312e12)
    assert "hfu" not in meter(**again).row(REPORT)


def test_mfu_of_a_published_pair():
    """Llama-2-7B, s 4096, A100: 4,550 tokens/s/GPU are 62.5 % causally (MosaicML's llm-foundry table)."""
    flops = 6 * (6_738_415_616 - 32000 * 4096 - 65 * 4096) + 6 * 32 * 4096 * 4096
    report = replace(REPORT, computed_tokens=4550, seconds=1.0)
    row = meter(flops_per_token=flops, num_devices=1, peak_flops=312e12).row(report)
    assert row["mfu"] == pytest.approx(0.625, abs=1e-3)


def test_8_bit_products_have_no_mfu():
    row = meter(peak_flops=312e12, multiplies_in_fp8=True).row(REPORT)
    assert row["bf16_equivalent"] == meter(peak_flops=312e12).row(REPORT)["mfu"]
    assert not [name for name in row if "mfu" in name or "hfu" in name]


def test_a_cpu_shows_its_share_of_the_gemm_rate_and_no_mfu():
    row = meter(gemm_flops=12.288e12).row(REPORT)
    assert row["gemm_share"] == pytest.approx(0.5)
    assert not [name for name in row if "mfu" in name]


def test_an_unknown_device_shows_neither():
    assert not {"mfu", "mfu_full_attention", "gemm_share"} & set(meter().row(REPORT))


def test_time_left_follows_this_run_and_not_the_one_it_resumed():
    """Resumed at 800 of 1,000 samples, 2 s for 10 samples: 190 left take 38 s. Counted from zero it would be 0.47 s."""
    clock = iter([100.0, 102.0])
    running = meter(total_samples=1000, clock=lambda: next(clock))
    report = replace(REPORT, global_batch=10, seconds=2.0)
    assert running.row(replace(report, consumed_samples=810))["seconds_left"] == pytest.approx(38.0)
    assert running.row(replace(report, consumed_samples=820))["seconds_left"] == pytest.approx(36.0)


def test_time_left_counts_what_happens_between_steps():
    """A validation of 6 s after each step of 2 s makes a sample four times as long."""
    clock = iter([2.0, 10.0, 18.0])
    running = meter(total_samples=100, clock=lambda: next(clock))
    report = replace(REPORT, global_batch=10, seconds=2.0)
    left = [running.row(replace(report, consumed_samples=10 * step))["seconds_left"] for step in (1, 2, 3)]
    assert left == pytest.approx([18.0, 80 * 10 / 20, 70 * 18 / 30])


def test_time_left_forgets_the_distant_past():
    """After the window is full of fast steps, a slow start no longer shows."""
    clock = iter([1000.0] + [1000.0 + step for step in range(1, 61)])
    running = meter(total_samples=200, clock=lambda: next(clock))
    report = replace(REPORT, global_batch=1, seconds=1000.0)
    left = [running.row(replace(report, consumed_samples=step))["seconds_left"] for step in range(1, 62)]
    assert left[0] == pytest.approx(199_000.0)
    assert left[-1] == pytest.approx(139.0)


def test_nothing_is_left_past_the_end():
    assert meter(total_samples=4).row(REPORT)["seconds_left"] == 0.0


def test_attention_counts_the_documents_that_are_kept_apart():
    """Of 6 GFLOP a token 2 are attention's; documents that leave a quarter of it leave 4.5."""
    report = replace(REPORT, attention_share=0.25)
    row = meter(attention_flops_per_token=2e9, peak_flops=312e12, gemm_flops=1e12).row(report)
    assert row["tflops_per_device"] == pytest.approx(1024 * 4.5e9 / 1e12)
    assert row["mfu"] == pytest.approx(1024 * 4.5e9 / 312e12)
    assert row["gemm_share"] == pytest.approx(1024 * 4.5e9 / 1e12)
    assert row["mfu_full_attention"] == pytest.approx(1024 * 7e9 / 312e12), "a convention that knows no documents"


def test_the_max_z_loss_has_a_column_of_its_own_where_there_is_one():
    assert "z_loss" not in meter().row(REPORT)
    assert meter().row(replace(REPORT, z_loss=0.25))["z_loss"] == 0.25
