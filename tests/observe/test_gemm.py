import torch

from megatron_aquila.observe.gemm import measure_gemm_flops


def test_the_rate_is_flops_over_time(monkeypatch):
    """With a clock that advances one second a look, four matmuls of 8 end before the fifth second."""
    ticks = iter(float(tick) for tick in range(100))
    monkeypatch.setattr("megatron_aquila.observe.gemm.time.perf_counter", lambda: next(ticks))
    assert measure_gemm_flops(torch.device("cpu"), size=8, seconds=5.0) == 2 * 8**3 * 4 / 5


def test_the_rate_of_this_machine_is_plausible():
    assert 1e8 < measure_gemm_flops(torch.device("cpu"), size=256, seconds=0.05) < 1e14
