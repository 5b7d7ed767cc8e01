"""NUMERICS, FLOPs and MFU: the table of models and the pairs that others published."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_aquila.data.documents import DocumentRules
from megatron_aquila.kernels.dispatch import choose_kernels
from megatron_aquila.model.aquila import build_stages
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.parallel.weight_grads import MainGrad
from megatron_aquila.plan.flops import (
    attention_flops,
    flops_per_token,
    head_flops,
    layer_flops,
    matmul_params,
    mfu,
    num_params,
    peak_flops,
)
from megatron_aquila.plan.recompute import MODULES, plan_recompute, recomputed_flops
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.plan.stages import plan_stages
from megatron_aquila.train.loss import LossSums
from megatron_aquila.train.step import attended
from megatron_aquila.verify.sample import sample_batch
from megatron_aquila.verify.shrink import EOD
from tests.plan.shapes import AQUILA_7B, AQUILA_34B, AQUILA_70B


@pytest.mark.parametrize(
    ("shape", "params"), [(AQUILA_7B, 7_295_537_152), (AQUILA_34B, 33_693_554_688), (AQUILA_70B, 70_090_891_264)]
)
def test_parameter_counts_of_the_recipes(shape, params):
    assert num_params(shape) == params
    padded = replace(shape, vocab_size=shape.padded_vocab_size)
    assert num_params(padded) - params == 2 * (shape.padded_vocab_size - shape.vocab_size) * shape.hidden_size


@pytest.mark.parametrize(
    ("shape", "matmul", "causal", "full"),
    [
        (AQUILA_7B, 6.8856, 42.924, 44.535),
        (replace(AQUILA_7B, seq_len=4096), 6.8856, 44.535, 47.756),
        (AQUILA_34B, 33.078, 207.53, 216.59),
    ],
)
def test_the_table_of_flops(shape, matmul, causal, full):
    assert matmul_params(shape) / 1e9 == pytest.approx(matmul, rel=2e-5)
    assert flops_per_token(shape) / 1e9 == pytest.approx(causal, rel=3e-5)
    assert flops_per_token(shape, "full") / 1e9 == pytest.approx(full, rel=3e-5)


def test_layers_and_head_add_up():
    for shape in (AQUILA_7B, AQUILA_34B):
        assert shape.num_layers * layer_flops(shape) + head_flops(shape) == flops_per_token(shape)
    # The head weighs about two layers of the 7B and 1.1 of the 34B.
    assert head_flops(AQUILA_7B) / layer_flops(AQUILA_7B) == pytest.approx(1.95, abs=0.05)
    assert head_flops(AQUILA_34B) / layer_flops(AQUILA_34B) == pytest.approx(1.1, abs=0.05)


def llama(num_layers, hidden_size, num_heads, num_kv_heads, ffn, vocab_size, seq_len):
    return ModelShape(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_size=ffn,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        vocab_size=vocab_size,
        padded_vocab_size=vocab_size,
        seq_len=seq_len,
    )


LLAMA2_7B = llama(32, 4096, 32, 32, 11008, 32000, 4096)
LLAMA31_8B = llama(32, 4096, 32, 8, 14336, 128256, 8192)
QWEN25_7B = llama(28, 3584, 28, 4, 18944, 152064, 1024)
A100 = peak_flops("NVIDIA A100-SXM4-80GB")
H100 = peak_flops("NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(
    ("shape", "attention", "tokens_per_second", "peak", "percent"),
    [
        (LLAMA2_7B, "causal", 4550, A100, 62.5),
        (LLAMA2_7B, "full", 4550, A100, 67.2),
        (LLAMA31_8B, "causal", 10682, H100, 55.6),
        (LLAMA31_8B, "full", 10682, H100, 62.5),
        (QWEN25_7B, "causal", 13863, H100, 60.3),
        (QWEN25_7B, "full", 13863, H100, 61.2),
    ],
)
def test_published_pairs_of_speed_and_mfu(shape, attention, tokens_per_second, peak, percent):
    assert 100 * mfu(tokens_per_second, flops_per_token(shape, attention), peak) == pytest.approx(percent, abs=0.1)
    # The test can fail: leaving the head out is several tenths of a point away.
    headless = flops_per_token(shape, attention) - head_flops(shape)
    assert 100 * mfu(tokens_per_second, headless, peak) < percent - 0.5


def test_published_pair_of_mpt_7b():
    # MPT has an ungated MLP of two matrices of 4 H and ties its head to the embedding.
    layers, hidden, vocab, seq_len = 32, 4096, 50368, 2048
    matmul = layers * 12 * hidden**2 + vocab * hidden
    for attention, percent in (("causal", 61.8), ("full", 64.1)):
        flops = 6 * matmul + layers * attention_flops(hidden, seq_len, attention)
        assert 100 * mfu(4641, flops, A100) == pytest.approx(percent, abs=0.1)


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A800-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.4),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
    ],
)
def test_device_peaks(name, precision, tflops):
    assert peak_flops(name, precision) == tflops * 1e12


@pytest.mark.parametrize(("name", "precision"), [("NVIDIA A1000", "bf16"), ("cpu", "bf16"), ("NVIDIA B200", "fp64")])
def test_an_unknown_device_or_precision_has_no_peak(name, precision):
    assert peak_flops(name, precision) is None


ATTENTION = {  # torch's counter does not know the kernels of a CPU
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, *_, **__: pairs(q, 2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, *_, **__: pairs(q, 4),
}


def pairs(q_BNSD, products):
    """FLOPs of attention's products, 2 forward and 4 backward, of half of S x S pairs: as the formula counts."""
    batch, heads, seq_len, width = q_BNSD
    return products * batch * heads * seq_len**2 * width


SMALL = replace(llama(2, 32, 4, 2, 48, 64, 16), head_dim=8)
APART = DocumentRules(eod=EOD, reset_positions=True, reset_attention=True, mask_loss=True)


STAGES = plan_stages(SMALL, 1)
AGAIN = {  # what is recomputed -> by formula
    "none": plan_recompute(STAGES, kind="none"),
    "norms and swiglu": plan_recompute(STAGES, kind="selective", modules=("norms", "swiglu")),
    "attention": plan_recompute(STAGES, kind="selective", modules=MODULES),
    "full, layer by layer": plan_recompute(STAGES, kind="full"),
    "full, in one group": plan_recompute(STAGES, kind="full", num_layers=2),
    "full, the first layer": plan_recompute(STAGES, kind="full", method="block"),
}


def counted_flops(batch, losses, *, loss_chunk_tokens=None, fused=False, recompute=AGAIN["none"]):
    """FLOPs of the products that forward and backward of one microbatch really run."""
    ctx = ParallelContext.single()
    placement = Placement(tp=ctx.tp, sequence_parallel=False, dtype=torch.float32, device=ctx.device)
    (stage,) = build_stages(
        SMALL,
        STAGES,
        pp_rank=0,
        placement=placement,
        kernels=choose_kernels(ctx.device, torch.float32),
        recompute=recompute,
        loss_chunk_tokens=loss_chunk_tokens,
    ).values()
    for weight in stage.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    if fused:
        sums = {weight: MainGrad(torch.zeros_like(weight), lambda: None) for weight in stage.parameters()}
        placement.weight_grads.accumulate_into(sums)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counted:
        losses.loss(stage(None, batch), batch).backward()
    return counted.get_total_flops()


def weighed_batch(documents=None):
    """A microbatch of two samples, its losses, and the share of S x S pairs that its attention works on."""
    losses = LossSums(["a", "b"], num_tokens=32, device=torch.device("cpu"))
    (batch,) = losses.weigh([sample_batch(SMALL, range(2, 4), seed=1, documents=documents)])
    return batch, losses, attended(batch, cp=1) / (2 * SMALL.seq_len**2)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("loss_chunk_tokens", [None, 5, 0])
@pytest.mark.parametrize("documents", [None, APART])
def test_flops_by_formula_are_those_of_a_traced_step(documents, loss_chunk_tokens, fused):
    batch, losses, share = weighed_batch(documents)
    assert (share < 0.7) if documents else (share == 1)
    attention = SMALL.num_layers * attention_flops(SMALL.attention_size, SMALL.seq_len)
    expected = 2 * SMALL.seq_len * (flops_per_token(SMALL) - (1 - share) * attention)
    assert counted_flops(batch, losses, loss_chunk_tokens=loss_chunk_tokens, fused=fused) == expected


@pytest.mark.parametrize("loss_chunk_tokens", [None, 0])
@pytest.mark.parametrize("documents", [None, APART])
@pytest.mark.parametrize("again", AGAIN)
def test_what_is_recomputed_is_counted_apart_from_the_model(again, documents, loss_chunk_tokens):
    """A traced step runs the formula's FLOPs and the recomputed ones: HFU counts both, MFU the first alone."""
    batch, losses, share = weighed_batch(documents)
    recomputed = recomputed_flops(SMALL, STAGES, AGAIN[again], 1)
    attention = SMALL.num_layers * attention_flops(SMALL.attention_size, SMALL.seq_len)
    model = flops_per_token(SMALL) - (1 - share) * attention
    executed = model + recomputed.linears + share * recomputed.attention
    found = counted_flops(batch, losses, loss_chunk_tokens=loss_chunk_tokens, recompute=AGAIN[again])
    assert found == pytest.approx(2 * SMALL.seq_len * executed, rel=1e-12)
    assert (executed > model) == (again not in ("none", "norms and swiglu"))
