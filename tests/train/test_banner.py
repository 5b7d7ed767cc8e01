import io
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from megatron_aquila.config.cli import LoadedConfig
from megatron_aquila.config.derive import derive, memory_plan
from megatron_aquila.config.observe import ObserveConfig
from megatron_aquila.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.config.settings import all_settings
from megatron_aquila.errors import AquilaError, ConfigError
from megatron_aquila.observe.log import Log
from megatron_aquila.plan.recompute import Kind
from megatron_aquila.train import banner
from megatron_aquila.train.bubble import run_schedule
from megatron_aquila.train.launcher import Launch

CONFIG = RunConfig(
    model=ModelConfig(num_layers=6, hidden_size=64, num_heads=4),
    parallel=ParallelConfig(tensor=2, pipeline=2),
    train=TrainConfig(global_batch=8),
)


def test_the_first_lines_say_what_differs_and_what_is_planned() -> None:
    stream = io.StringIO()
    sources = dict.fromkeys(all_settings(), "default") | {
        "parallel.tensor": "flag --tp",
        "model.num_layers": "file a:3",
    }
    loaded = LoadedConfig(CONFIG, sources)
    banner.print_banner(Log(stream=stream), loaded, derive(CONFIG, 8))
    banner.print_kernels(Log(stream=stream), CONFIG, {"attention": "sdpa: why not"})
    text = stream.getvalue()
    for expected in ("2  (flag --tp)", "6  (file a:3)", "8 = tp 2 x cp 1 x dp 2 x pp 2", "sdpa: why not", "bubble"):
        assert expected in text
    assert "seed" not in text


def test_kernels_that_are_set_and_not_chosen_are_told_of() -> None:
    plain = banner.set_kernels(CONFIG)
    assert (
        plain["linear_cross_entropy"] == "in one with its projection, logits of as many tokens as 1 GiB holds at once"
    )
    assert plain["weight_gradient"] == "added to the sums in the product"
    assert plain["products"] == "bf16"
    chunked = banner.set_kernels(replace(CONFIG, train=replace(CONFIG.train, loss_chunk_tokens=512, precision="fp8")))
    assert "512 tokens at once" in chunked["linear_cross_entropy"]
    assert "pass of their own" in chunked["weight_gradient"]
    assert chunked["products"].startswith("fp8")
    kept = replace(CONFIG.train, loss_chunk_tokens=0)
    apart = banner.set_kernels(replace(CONFIG, train=kept, parallel=replace(CONFIG.parallel, fuse_main_grads=False)))
    assert "all logits" in apart["linear_cross_entropy"]
    assert "autograd" in apart["weight_gradient"]


def test_a_machine_must_hold_the_plans_of_all_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    derived = derive(CONFIG, 8)
    plan = memory_plan(CONFIG, derived, run_schedule(CONFIG, derived))
    needs = [plan.of_rank(derived.grid.coords(rank)["pp"]).total for rank in range(8)]
    assert len(set(needs)) == 2
    cpu = torch.device("cpu")
    for first, count in ((0, 8), (0, 4), (4, 4)):  # all on one machine, or on two
        total = sum(needs[first : first + count])
        launch = Launch(rank=first + 1, local_rank=1, world_size=8, local_world_size=count)
        monkeypatch.setattr(banner, "machine_memory", lambda total=total: total)
        banner.check_memory(CONFIG, derived, cpu, launch)
        monkeypatch.setattr(banner, "machine_memory", lambda total=total: total - 1)
        why = rf"--device cpu: the plan needs more than this machine's .* GiB for {count} processes, the fullest .*: "
        told = rf"{why}weights .*; turn on --sp.* use fewer processes on this machine, or more machines, or a smaller"
        with pytest.raises(ConfigError, match=told) as refused:
            banner.check_memory(CONFIG, derived, cpu, launch)
        assert refused.value.is_shared == (count == 8), "one machine's trouble is not every rank's"
        assert not any(way in str(refused.value) for way in ("offload", "--tp", "--pp", "data-parallel"))


def test_what_leaves_a_cpu_stays_in_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, parallel=ParallelConfig(), train=TrainConfig(global_batch=8, offload_activations=6))
    config = replace(config, optim=replace(config.optim, offload_optimizer=1.0))
    derived = derive(config, 1)
    plan = replace(memory_plan(config, derived, run_schedule(config, derived)), pinned=False)
    assert plan.host_of_rank(0).total > 0
    total = plan.of_rank(0).total + plan.host_of_rank(0).total
    monkeypatch.setattr(banner, "machine_memory", lambda: total)
    banner.check_memory(config, derived, torch.device("cpu"), Launch())
    monkeypatch.setattr(banner, "machine_memory", lambda: total - 1)
    with pytest.raises(ConfigError, match="the plan needs more than this machine's"):
        banner.check_memory(config, derived, torch.device("cpu"), Launch())


def test_a_plan_that_cannot_fit_is_refused_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small:
        total_memory = 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Small())
    narrower = "use --master-weights remainder, use --moments-dtype bf16"
    host = "use --offload-activations, use --offload-optimizer 1"
    shared = r"raise --zero \(now 1\) where there are several replicas, raise --tp \(now 2\)"
    told = rf"turn on --sp, turn on --recompute selective, or full, {narrower}, {host}, {shared}"
    with pytest.raises(ConfigError, match=told):
        banner.check_memory(CONFIG, derive(CONFIG, 8), torch.device("cuda", 0), Launch())


def test_each_rank_s_own_stages_and_micro_batch_must_fit_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    train = replace(CONFIG.train, micro_batch_per_dp=(6, 2))
    config = replace(CONFIG, parallel=replace(CONFIG.parallel, stage_layers=(5, 1)), train=train)
    derived = derive(config, 8)
    order = run_schedule(config, derived)
    needs = {
        rank: memory_plan(config, derived, order, micro_batch=(6, 2)[place["dp"]]).of_rank(place["pp"]).total
        for rank in range(8)
        if (place := derived.grid.coords(rank))
    }
    assert len(set(needs.values())) == 4, "a stage and a micro-batch each"
    for rank, need in needs.items():
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, need=need: Mock(total_memory=need))
        banner.check_memory(config, derived, torch.device("cuda", 0), Launch(rank=rank, world_size=8))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, need=need: Mock(total_memory=need - 1))
        with pytest.raises(ConfigError, match="lower this replica's number in --micro-batch-per-dp, turn on --sp"):
            banner.check_memory(config, derived, torch.device("cuda", 0), Launch(rank=rank, world_size=8))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, None),
        (989.4, None),
        (800.0, None),
        (1979.0, r"--peak-tflops 1979.0: the dense peak of NVIDIA H100 80GB HBM3 in bf16 is 989.4; twice that is with "
                 r"sparsity, which no training uses; leave it out, or use at most 989.4"),
        (1000.0, r"--peak-tflops 1000.0: the dense peak of NVIDIA H100 80GB HBM3 in bf16 is 989.4; leave it out"),
    ],
)  # fmt: skip
def test_a_peak_above_the_dense_one_is_refused(
    given: float | None, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, observe=ObserveConfig(peak_tflops=given))
    banner.check_peak(config, torch.device("cpu"))
    names = iter(["NVIDIA H100 80GB HBM3", "a GPU of tomorrow"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    with nullcontext() if said is None else pytest.raises(ConfigError, match=said):
        banner.check_peak(config, torch.device("cuda", 0))
    banner.check_peak(config, torch.device("cuda", 0))  # where no peak is known, the user is believed


def test_steps_are_recorded_on_a_gpu_alone() -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, cuda_graph=True))
    banner.check_graph(config, torch.device("cuda", 0))
    banner.check_graph(CONFIG, torch.device("cpu"))
    with pytest.raises(ConfigError, match="--cuda-graph: no GPU is here; leave it out"):
        banner.check_graph(config, torch.device("cpu"))


def test_running_out_of_memory_says_what_to_change() -> None:
    with (
        pytest.raises(AquilaError, match=r"planned for the fullest rank were .* MiB.*raise --tp \(now 2\)"),
        banner.explain_out_of_memory(CONFIG, derive(CONFIG, 8)),
    ):
        raise torch.OutOfMemoryError("tried to allocate")


def test_states_can_be_narrower_in_bf16_until_they_are() -> None:
    narrow = replace(CONFIG.optim, master_weights="remainder")
    assert banner.narrower_states(replace(CONFIG, optim=narrow)) == ["use --moments-dtype bf16"]
    assert banner.narrower_states(replace(CONFIG, optim=replace(narrow, moments_dtype="bf16"))) == []
    assert banner.narrower_states(replace(CONFIG, train=replace(CONFIG.train, precision="fp32"))) == []


def test_the_way_to_save_is_the_next_kind_of_recomputation() -> None:
    def ways(kind: Kind) -> str:
        return banner.ways_to_save(replace(CONFIG, train=replace(CONFIG.train, recompute=kind)))

    assert "turn on --recompute selective, or full" in ways("none")
    assert "use --recompute full" in ways("selective")
    assert "recompute" not in ways("full")
