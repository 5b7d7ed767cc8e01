"""The benchmarks of a GPU, tried on a CPU with tiny shapes: every row they would write, whatever fails."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import ceilings, kernels, loop, step
from benchmarks.block_cases import packed_bounds
from benchmarks.case import Size
from benchmarks.contestants import OurStep, RandomTokens, llama, transformers_step
from benchmarks.liger import LIGER
from benchmarks.shapes import MODELS, TINY_MODELS, model_config
from benchmarks.step import Contestant, Options, Way
from megatron_aquila.config.derive import derive
from megatron_aquila.kernels.dispatch import IMPLEMENTATIONS
from megatron_aquila.plan.flops import num_params
from megatron_aquila.train.banner import set_kernels

CPU = torch.device("cpu")
TRY = ["--device", "cpu", "--tiny"]


def rows_of(benchmark, out, *flags):
    assert benchmark.main([*TRY, "--out", str(out), *flags]) == 0
    return json.loads(out.read_text())["tables"]


def test_ceilings_measure_products_copies_and_attention(tmp_path):
    flags = ["--seconds", "0.0001", "--tokens", "16", "--seq-lens", "8", "--copy-mib", "1"]
    tables = rows_of(ceilings, tmp_path / "x.json", *flags)
    assert len(tables["copy"]) == 1
    assert len(tables["gemm"]) == len(TINY_MODELS) * 5 * 4
    assert all(row["tflops"] > 0 for row in tables["gemm"])
    by_backend = {(row["model"], row["backend"]): row for row in tables["attention"]}
    assert by_backend.keys() == {(model, backend) for model in TINY_MODELS for backend in ceilings.BACKENDS}
    assert by_backend["tiny", "cuDNN"]["error"]  # a row, not a crash
    assert by_backend["tiny-grouped", "flash"]["tflops"] > 0


SMALL = Size(derive(model_config("tiny"), 1).shape, seq_len=8, batch=2)
CASES = {name: make(SMALL, CPU, torch.float32) for name, make in kernels.CASES.items()}


def test_every_kernel_that_the_start_tells_of_has_a_case():
    told = IMPLEMENTATIONS.keys() | set_kernels(model_config("tiny")).keys()
    assert {case.op for case in CASES.values()} == told
    assert {"attention, packed documents", "rope_qkv, interleaved", "adamw, 12 bytes"} < CASES.keys() > LIGER.keys()


def test_kernels_are_compared_and_those_that_cannot_run_say_why(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "TINY_MODELS", ["tiny"])  # each compiles its own
    flags = ["--rounds", "1", "--calls", "1", "--seq-len", "8", "--batch", "2", "--no-compiled"]
    rows = rows_of(kernels, tmp_path / "x.json", *flags)["kernels"]
    for name, case in CASES.items():
        found = [row for row in rows if (row["op"], row["model"]) == (name, "tiny")]
        references = [row for row in found if row["name"] == "torch eager, the reference"]
        assert [row["direction"] for row in references] == [*kernels.directions(case)]
        known = {"torch eager, the reference", "liger-kernel", *case.kernels, *IMPLEMENTATIONS.get(case.op, {})}
        assert {row["name"] for row in found} <= known
        assert all(row.get("error") or row["rate"] > 0 for row in found)
        narrow = "fp8" in str(found) or name == "adamw, 12 bytes"  # 2 and 8 bits of mantissa
        assert all(row.get("error") or row["largest_error"] < (0.2 if narrow else 1e-5) for row in found)
        assert any(row["name"] in case.kernels for row in found if "rate" in row) or not case.kernels


def test_kernels_go_on_with_what_is_measured(tmp_path, monkeypatch):
    out, measured = tmp_path / "x.json", []

    def measure(record, where, case, kernels, options):
        measured.append(where["op"])
        for number in range(2):
            record.add("kernels", **where, number=number)

    monkeypatch.setattr(kernels, "TINY_MODELS", ["tiny"])
    monkeypatch.setattr(kernels, "measure", measure)
    flags = ["--seq-len", "8", "--batch", "2", "--resume"]
    rows_of(kernels, out, *flags, "--ops", "swiglu", "grad_norm")
    found = rows_of(kernels, out, *flags, "--ops", "swiglu", "grad_norm", "adamw")["kernels"]
    assert measured == ["swiglu", "grad_norm", "grad_norm", "adamw"], "the last of the file may not be whole"
    assert [row["op"] for row in found] == ["swiglu"] * 2 + ["grad_norm"] * 2 + ["adamw"] * 2


def test_a_wrong_kernel_shows_in_its_error():
    case = CASES["swiglu"]
    right, wrong, broken = case.reference, lambda x: case.reference(x) * 1.01, lambda x: x.no_such_thing
    errors = kernels.errors_of(case, {"right": right, "wrong": wrong, "broken": broken})
    assert errors["right"] < 1e-6 < 5e-3 < errors["wrong"]
    assert "AttributeError" in errors["broken"]


def test_a_narrow_update_is_held_against_the_wide_one():
    case = CASES["adamw, 12 bytes"]

    def lossy(param, grad, mean, square, *, remainder, **settings):
        case.reference(param, grad, mean, square, remainder=remainder, **settings)
        remainder.zero_()

    def forgetful(param, grad, mean, square, *, remainder, **settings):
        case.reference(param, grad, mean.clone(), square, remainder=remainder, **settings)

    errors = kernels.errors_of(case, {"right": case.reference, "lossy": lossy, "forgetful": forgetful})
    assert errors["right"] < 2**-8 < errors["forgetful"], "moments are rounded to 8 bits"
    master = kernels.outcome(case, case.reference)[0], kernels.outcome(case, lossy)[0], case.exact()[0]
    assert (master[0] - master[2]).abs().max() < 1e-6 < 1e-4 < (master[1] - master[2]).abs().max()


def test_documents_are_packed_in_uneven_lengths():
    assert packed_bounds(64) == (0, 32, 48, 56, 60, 62, 64)
    assert packed_bounds(1) == (0, 1)


def test_the_shapes_are_the_recipes_on_one_process():
    layers = {model: model_config(model).model.num_layers for model in MODELS}
    assert layers == {"7b": 32, "7b-8": 8, "34b": 60, "34b-8": 8}
    for model in MODELS:
        config = model_config(model)
        assert (config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence) == (1, 1, False)
        assert config.train.rampup_batch is None


STEP = ["--seq-lens", "16", "--micro-batches", "1", "--microbatches", "2", "--no-compiled", "--steps", "1"]
STEP += ["--warmup", "1", "--recompute", "selective"]


def test_a_step_compares_ours_with_transformers(tmp_path):
    tables = rows_of(step, tmp_path / "x.json", *STEP, "--ours", "chosen", "--loss-chunk-tokens", "0")
    assert [(row["model"], row["name"]) for row in tables["step"]] == [
        (model, name) for model in TINY_MODELS for name in ("megatron_aquila", "transformers")
    ]
    assert all(row["calls"] == 2 and row["tokens_per_second"] > 0 for row in tables["step"])
    assert [row["model"] for row in tables["loop"]] == [*TINY_MODELS]
    for row in tables["loop"]:
        assert row["host_seconds"] > 0
        assert 0 < row["update_share"] < 1, row
        assert row["log_between"] > -1, row
    assert json.loads((tmp_path / "x.json").read_text())["settings"]["flags"] == ["--loss-chunk-tokens", "0"]


def test_a_step_goes_on_with_what_is_measured(tmp_path, monkeypatch):
    out = tmp_path / "x.json"
    taken = []

    def measured(found, *_):
        taken.append(found.keys())
        for one in found.values():
            one.seconds = [0.5]
        return found

    monkeypatch.setattr(step, "measured", measured)
    first = rows_of(step, out, *STEP, "--resume")["step"]
    assert len(taken) == len(TINY_MODELS)
    again = rows_of(step, out, *STEP, "--resume", "--minutes", "3", "--micro-batches", "1", "2")["step"]
    assert len(taken) == 2 * len(TINY_MODELS), "cases that are there are not measured again"
    assert again[: len(first)] == first
    assert len(again) == 2 * len(first)
    with pytest.raises(SystemExit, match="has another settings"):
        step.main([*TRY, "--out", str(out), *STEP, "--resume", "--kernels", "swiglu=reference"])


def test_what_no_time_is_left_for_is_named():
    options = Options()
    found = step.cases(options)
    assert len({*found}) == len(found) == 54
    at_8192 = [(seq_len, 8192 // seq_len) for seq_len in options.seq_lens]
    assert [(case.model, case.seq_len, case.micro_batch, case.recompute) for case in found[:9]] == [
        (model, *sizes, "none") for model in options.models for sizes in at_8192
    ]
    seconds = step.planned_seconds(step.case_config(found[0], options), options)
    # 2 turns of 3 contestants, 14 steps of 32,768 tokens of 42.9 GFLOP, and the loop's
    one = 32768 * 42.92e9 / step.PLANNED_RATE
    assert seconds == pytest.approx(6 * (step.START_SECONDS + 14 * one) + step.LOOP_STEPS * one, rel=1e-3)


def test_time_is_planned_by_what_the_cases_before_took():
    now = [0.0]
    budget = step.Budget(10, clock=lambda: now[0])
    assert budget.has_time_for(600)
    assert not budget.has_time_for(601)
    now[0] = 200.0
    budget.spent(400, since=0.0)
    assert budget.has_time_for(800), "cases take half of what was planned"
    assert not budget.has_time_for(801)


def test_states_are_narrow_where_else_the_plan_exceeds_the_device():
    case = step.cases(Options())[0]
    config = step.case_config(case, Options())
    wide, narrow = step.our_ways(config, CPU, None)
    assert (wide.config, wide.to_fit, narrow.to_fit) == (config, "", step.NARROW)
    assert step.planned_bytes(wide.config) > 141e9 * step.FILLED > step.planned_bytes(narrow.config)
    (only,) = step.our_ways(config, CPU, 141 * 10**9)
    assert only.config == narrow.config
    assert (only.config.optim.moments_dtype, only.config.optim.master_weights) == ("bf16", "remainder")
    assert len(step.our_ways(config, CPU, 200 * 10**9)) == 2
    (plain,) = step.our_ways(replace(config, train=replace(config.train, precision="fp16")), CPU, 10**9)
    assert plain.to_fit == "", "masters of fp16 have no remainder"


def test_compiled_kernels_are_a_contestant_and_those_named_stay():
    config = step.with_compiled_kernels(model_config("tiny", "--kernels", "swiglu=own"))
    ops = dict(word.split("=") for word in config.train.kernels)
    assert ops == {"swiglu": "own", **dict.fromkeys(("rms_norm", "add_rms_norm", "rope_qkv"), "compiled")}
    found = step.contestants(model_config("tiny", "--device", "cpu"), Options(), CPU)
    assert [(name, one.wants_loop) for name, one in found.items()] == [
        ("megatron_aquila", True),
        ("megatron_aquila, compiled kernels", False),
        ("transformers, compiled", False),
    ]
    assert not step.contestants(config, Options(loop=False, only_ours=True), CPU)["megatron_aquila"].wants_loop


def test_out_of_memory_is_a_row_and_the_next_way_is_tried():
    config = model_config("tiny", "--seq-len", "16", "--device", "cpu")

    def way(error=None, to_fit=""):
        def build():
            if error is not None:
                raise error
            return lambda: None

        return Way(build, config, to_fit)

    gone = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
    found = {
        "second way": Contestant([way(gone), way(to_fit="less")]),
        "no way": Contestant([way(gone)]),
        "broken": Contestant([way(ValueError("no compiler")), way(to_fit="less")]),
    }
    step.measured(found, Options(rounds=2, steps=3, warmup=1), CPU)
    rows = {name: step.result(one, config, CPU) for name, one in found.items()}
    assert rows["second way"]["to_fit"] == "less"
    assert rows["second way"]["calls"] == 6
    assert rows["no way"]["error"] == "CUDA out of memory. Tried to allocate"
    assert rows["broken"]["error"] == "ValueError: no compiler"


def test_the_host_s_time_is_without_what_it_waits_for_the_device():
    class Device:
        type = "cpu"

    now = [0.0]

    def clock():
        now[0] += 1.0
        return now[0]

    stage = loop.Drained(lambda x, batch: (x, batch), Device(), clock=clock)
    assert stage(1, 2) == (1, 2)
    assert stage.waited == 2.0, "before and behind"


@pytest.mark.parametrize(("precision", "share"), [("bf16", "mfu"), ("fp8", "bf16_equivalent")])
def test_a_share_of_the_peak_is_an_mfu_only_where_no_8_bits_are_multiplied(precision, share):
    config = model_config("tiny", "--seq-len", "16", "--device", "cpu", "--precision", precision)
    row = step.result(Contestant([Way(lambda: lambda: None, config)], seconds=[0.5]), config, CPU)
    assert {"mfu", "bf16_equivalent"} & row.keys() == {share}


def test_both_contestants_train_the_same_model():
    config = model_config("tiny-grouped", "--seq-len", "16", "--micro-batch", "2", "--global-batch", "2")
    shape = derive(config, 1).shape
    model = llama(shape, torch.float32, CPU)
    assert sum(weight.numel() for weight in model.parameters()) == num_params(shape)
    assert model.config.rope_parameters["rope_theta"] == shape.rope_base
    ours = OurStep(config, CPU)
    ours()
    theirs = transformers_step(config, CPU, weights="masters", is_compiled=False, checkpointing=True)
    theirs()


def test_random_tokens_are_a_function_of_the_sample():
    source = RandomTokens(vocab_size=11, seq_len=5)
    assert source[3].tokens.shape == (6,)
    assert (source[3].tokens == source[3].tokens).all()
    assert (source[3].tokens != source[4].tokens).any()
    assert len(source) > 10**9
    assert source.describe()


def test_ours_is_also_recorded_where_a_gpu_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10**12))
    config, options = model_config("tiny", "--seq-len", "16"), Options(ours=("chosen", "recorded"), only_ours=True)
    found = step.contestants(config, options, torch.device("cuda"))
    assert [*found] == ["megatron_aquila", "megatron_aquila, CUDA graph"]
    assert [one.ways[0].config.train.cuda_graph for one in found.values()] == [False, True]
    assert [*step.contestants(config, options, CPU)] == ["megatron_aquila"]
