"""The benchmarks of a GPU, tried on a CPU with tiny shapes: every row they would write, whatever fails."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import ceilings, kernels, step
from benchmarks.contestants import RandomTokens, llama, our_step, transformers_step
from benchmarks.kernel_cases import CASES, LIGER, Size
from benchmarks.shapes import MODELS, TINY_MODELS, model_config
from benchmarks.step import Case, Contestant, Options
from megatron_aquila.config.derive import derive
from megatron_aquila.kernels.dispatch import IMPLEMENTATIONS
from megatron_aquila.plan.flops import num_params

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


def test_every_op_has_a_case():
    assert CASES.keys() == IMPLEMENTATIONS.keys() >= LIGER.keys()


def test_kernels_are_compared_and_those_that_cannot_run_say_why(tmp_path):
    flags = ["--rounds", "1", "--calls", "1", "--seq-len", "8", "--batch", "2", "--no-compiled"]
    rows = rows_of(kernels, tmp_path / "x.json", *flags)["kernels"]
    for op in IMPLEMENTATIONS:
        found = [row for row in rows if (row["op"], row["model"]) == (op, "tiny")]
        references = [row for row in found if row["name"] == "torch eager, the reference"]
        assert [row["direction"] for row in references] == ["forward", "backward"][: 1 if op == "adamw" else 2]
        assert {row["name"] for row in found} - {"liger-kernel", "torch eager, the reference"} < set(
            IMPLEMENTATIONS[op]
        )
        assert all(row.get("error") or (row["rate"] > 0 and row["largest_error"] < 1e-5) for row in found)


def test_a_wrong_kernel_shows_in_its_error():
    case = CASES["swiglu"](Size(derive(model_config("tiny"), 1).shape, seq_len=8, batch=2), CPU, torch.float32)
    right, wrong, broken = case.reference, lambda x: case.reference(x) * 1.01, lambda x: x.no_such_thing
    errors = kernels.errors_of(case, {"right": right, "wrong": wrong, "broken": broken})
    assert errors["right"] < 1e-6 < 5e-3 < errors["wrong"]
    assert "AttributeError" in errors["broken"]


def test_the_shapes_are_the_recipes_on_one_process():
    layers = {model: model_config(model).model.num_layers for model in MODELS}
    assert layers == {"7b": 32, "7b-8": 8, "34b": 60, "34b-8": 8}
    for model in MODELS:
        config = model_config(model)
        assert (config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence) == (1, 1, False)
        assert config.train.rampup_batch is None


def test_a_step_compares_ours_with_transformers(tmp_path):
    flags = ["--seq-lens", "16", "--micro-batches", "1", "--microbatches", "2", "--no-compiled"]
    flags += ["--rounds", "2", "--steps", "1", "--warmup", "1"]
    rows = rows_of(step, tmp_path / "x.json", *flags, "--recompute", "selective", "--loss-chunk-tokens", "0")["step"]
    assert [(row["model"], row["name"]) for row in rows] == [
        (model, name) for model in TINY_MODELS for name in ("megatron_aquila", "transformers")
    ]
    assert all(row["calls"] == 2 and row["tokens_per_second"] > 0 for row in rows)


def test_what_no_time_is_left_for_is_named(capsys):
    case = Case(model="7b", seq_len=2048, micro_batch=4, recompute="none")
    options = Options()
    assert [*step.cases(options)][:3] == [replace(case, model=model) for model in options.models]
    assert len([*step.cases(options)]) == 54
    seconds = step.planned_seconds(step.case_config(case, options), options)
    # 2 turns of 2 contestants, 14 steps of 32,768 tokens of 42.9 GFLOP
    assert seconds == pytest.approx(4 * (step.START_SECONDS + 14 * 32768 * 42.92e9 / step.PLANNED_RATE), rel=1e-3)


def test_ours_is_also_recorded_where_a_gpu_is():
    config, options = model_config("tiny", "--seq-len", "16"), Options(cuda_graph=True, only_ours=True)
    assert [*step.contestants(config, options, torch.device("cuda"))] == [
        "megatron_aquila",
        "megatron_aquila, CUDA graph",
    ]
    assert [*step.contestants(config, options, CPU)] == ["megatron_aquila"]
    alone = Options(only_ours=True)
    assert step.planned_seconds(config, options) == 2 * step.planned_seconds(config, alone)


def test_out_of_memory_is_a_row_and_the_next_way_is_tried():
    def fails(error):
        def build():
            raise error

        return build

    gone = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
    found = {
        "second way": Contestant([("", fails(gone)), ("full", lambda: lambda: None)], []),
        "no way": Contestant([("", fails(gone))], []),
        "broken": Contestant([("", fails(ValueError("no compiler"))), ("full", lambda: lambda: None)], []),
    }
    config = model_config("tiny", "--seq-len", "16", "--device", "cpu")
    step.measured(found, Options(rounds=2, steps=3, warmup=1), CPU)
    rows = {name: step.result(one, config, CPU) for name, one in found.items()}
    assert rows["second way"]["checkpointing"] == "full"
    assert rows["second way"]["calls"] == 6
    assert rows["no way"]["error"] == "CUDA out of memory. Tried to allocate"
    assert rows["broken"]["error"] == "ValueError: no compiler"


@pytest.mark.parametrize(("precision", "share"), [("bf16", "mfu"), ("fp8", "bf16_equivalent")])
def test_a_share_of_the_peak_is_an_mfu_only_where_no_8_bits_are_multiplied(precision, share):
    config = model_config("tiny", "--seq-len", "16", "--device", "cpu", "--precision", precision)
    row = step.result(Contestant([("", lambda: lambda: None)], [0.5]), config, CPU)
    assert {"mfu", "bf16_equivalent"} & row.keys() == {share}


def test_both_contestants_train_the_same_model():
    config = model_config("tiny-grouped", "--seq-len", "16", "--micro-batch", "2", "--global-batch", "2")
    shape = derive(config, 1).shape
    model = llama(shape, torch.float32, CPU)
    assert sum(weight.numel() for weight in model.parameters()) == num_params(shape)
    assert model.config._attn_implementation == "sdpa"
    assert model.config.rope_parameters["rope_theta"] == shape.rope_base
    ours = our_step(config, CPU)
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
