"""How often a block and the loss go over memory beside products and attention, counted from a trace without data."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_aquila.kernels.dispatch import IMPLEMENTATIONS, choose_kernels
from megatron_aquila.kernels.fp8 import PlainRounding, Quantized, Rounding, quantized
from megatron_aquila.kernels.ops import Kernels
from megatron_aquila.kernels.products import NATIVE, Fp8Products, Products
from megatron_aquila.model.block import Block
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.verify.dry import META, flash_attention
from tests.plan.shapes import AQUILA_7B

triton_rms_norm, triton_rope, triton_swiglu, triton_cross_entropy, triton_fp8 = (
    pytest.importorskip(f"megatron_aquila.kernels.triton.{name}", reason="Triton is not installed")
    for name in ("rms_norm", "rope", "swiglu", "cross_entropy", "fp8")
)

TOKENS, HIDDEN = 2048, AQUILA_7B.hidden_size
ELSEWHERE = {"mm", "_scaled_mm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"}
MOVES_NOTHING = {"empty", "empty_like", "new_empty", "_unsafe_view", "set_"}
# What the kernels of each file read and write; with ADDS, or both ROWS and COLUMNS, also what follows the semicolon.
READS = {
    (triton_rms_norm, "rms_norm_forward"): "x weight; residual",
    (triton_rms_norm, "rms_norm_backward"): "x weight inverse_rms grad_y; grad_total",
    (triton_rope, "rope_rotate"): "x cos sin",
    (triton_swiglu, "swiglu_forward"): "gate_up",
    (triton_swiglu, "swiglu_backward"): "gate_up grad",
    (triton_cross_entropy, "cross_entropy_statistics"): "logits columns is_mine",
    (triton_cross_entropy, "cross_entropy_gradient"): "logits columns is_mine log_sum weights",
    (triton_fp8, "fp8_largest"): "x",
    (triton_fp8, "fp8_cast"): "x largest",
}
WRITES = {
    (triton_rms_norm, "rms_norm_forward"): "y inverse_rms; total",
    (triton_rms_norm, "rms_norm_backward"): "grad_x grad_weight_parts",
    (triton_rope, "rope_rotate"): "out",
    (triton_swiglu, "swiglu_forward"): "out",
    (triton_swiglu, "swiglu_backward"): "grad_gate_up",
    (triton_cross_entropy, "cross_entropy_statistics"): "out",
    (triton_cross_entropy, "cross_entropy_gradient"): "logits",
    (triton_fp8, "fp8_largest"): "largest",
    (triton_fp8, "fp8_cast"): "by_rows scale; by_columns",
}


def num_bytes(x: Tensor) -> int:
    """Of what is read or written of ``x``: no more than there is, where it is expanded."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


class Passes(TorchDispatchMode):
    """Kernels that run inside, and the bytes they read and write: torch's ops, and launches of our Triton kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.num_kernels = self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **({} if kwargs is None else kwargs))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ELSEWHERE | MOVES_NOTHING:
            touched = args if name == "copy_" else (args, out)
            self.num_kernels += 1
            self.num_bytes += sum(num_bytes(leaf) for leaf in tree_iter(touched) if isinstance(leaf, Tensor))
        return out

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Ops and launches inside are counted."""
        with self, ExitStack() as stack:
            for module, name in READS:
                stack.enter_context(mock.patch.object(module, name, self.launches(module, name)))
            yield

    def launches(self, module: Any, name: str) -> Any:
        """In place of the Triton kernel ``module.name``: counts, and runs nothing."""
        names = list(inspect.signature(getattr(module, name).fn).parameters)

        def launch(*args: Any, **constants: Any) -> None:
            given = dict(zip(names, args, strict=False)) | constants
            for table in (READS, WRITES):
                always, _, added = table[module, name].partition(";")
                self.num_bytes += sum(num_bytes(given[word]) for word in always.split())
                adds = given.get("ADDS", False) or (given.get("ROWS", False) and given.get("COLUMNS", False))
                self.num_bytes += sum(num_bytes(given[word]) for word in added.split()) * adds
            self.num_kernels += 1

        return mock.MagicMock(__getitem__=lambda _, grid: launch)


def of_a_block(kernels: Kernels, products: Products = NATIVE) -> tuple[int, float]:
    """Kernels of forward and backward, and the values they read and write for each of a token's H values."""
    tp = ParallelContext.single().tp
    placement = Placement(tp=tp, sequence_parallel=False, dtype=torch.bfloat16, device=META, products=products)
    block = Block(AQUILA_7B, placement=placement, kernels=replace(kernels, attention=flash_attention))
    x = torch.empty(TOKENS, 1, HIDDEN, dtype=torch.bfloat16, device=META, requires_grad=True)
    cos = torch.empty(TOKENS, 1, AQUILA_7B.head_dim, device=META)
    passes = Passes()
    with passes.counting():
        block(x, cos, cos, None).backward(torch.empty_like(x))
    return passes.num_kernels, passes.num_bytes / (TOKENS * HIDDEN * 2)


OURS = choose_kernels(META, torch.bfloat16)
FUSED = {op: IMPLEMENTATIONS[op]["triton"] for op in ("rms_norm", "add_rms_norm", "rope_qkv", "swiglu")}


def add_then_norm(x: Tensor, residual: Tensor, weight: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, FUSED["rms_norm"](total, weight, **settings)


APART = {**FUSED, "add_rms_norm": add_then_norm}


@pytest.mark.parametrize(
    ("kernels", "num_kernels", "values"),
    [({}, 94, 387.5), (APART, 18, 53.9), (FUSED, 16, 50.9)],
    ids=["own", "apart", "fused"],
)
def test_a_block_of_the_7b_goes_over_memory_so_often(kernels: dict[str, Any], num_kernels: int, values: float) -> None:
    """What docs/log.md says."""
    found = of_a_block(replace(OURS, **kernels))
    assert (found[0], round(found[1], 1)) == (num_kernels, values)


def test_fused_passes_are_those_of_the_formula() -> None:
    """In values for each of a token's H: norms 2 + 4 forward and 3 + 4 backward, the two sums at the block's border 6,
    q and k 4 and 4, v's gradient 2, SwiGLU 3 F and 5 F. One in a hundred more are tables, weights and scales.
    """
    ffn = AQUILA_7B.ffn_size / HIDDEN
    expected = 6 + 7 + 6 + 10 + 8 * ffn
    assert expected < of_a_block(replace(OURS, **FUSED))[1] < 1.01 * expected


@pytest.mark.parametrize(("name", "num_kernels", "num_bytes"), [("own", 259, 56), ("triton", 2, 6)])
def test_the_loss_goes_over_a_chunks_logits_so_often(name: str, num_kernels: int, num_bytes: float) -> None:
    """The 7B's 4,096 tokens in bf16, beside the products: kernels, and bytes read and written of each logit.

    What docs/log.md says. Of our own, logsumexp counts as one kernel that reads once, and it is several.
    """
    rows, columns = 4096, AQUILA_7B.padded_vocab_size
    logits = torch.empty(rows, columns, dtype=torch.bfloat16, device=META)
    labels = (torch.empty(rows, dtype=torch.int64, device=META), torch.empty(rows, dtype=torch.bool, device=META))
    weights, num_real, passes = torch.empty(rows, device=META), AQUILA_7B.vocab_size, Passes()
    with passes.counting():
        log_sum, _ = IMPLEMENTATIONS["softmax_statistics"][name](logits, *labels, num_real=num_real)
        IMPLEMENTATIONS["softmax_gradient"][name](logits, *labels, log_sum, weights, num_real=num_real)
    assert (passes.num_kernels, round(passes.num_bytes / logits.numel(), 1)) == (num_kernels, num_bytes)


class Apart(PlainRounding):
    """What is multiplied twice is rounded twice."""

    def both(self, x: Tensor, dtype: torch.dtype) -> tuple[Quantized, Quantized]:
        """``rows`` and ``columns``."""
        return quantized(x, dtype), quantized(x.T, dtype)


# By Triton two reads of each operand and a write, x and weight once a layout: 10 bytes; grad_y both at once: 6.
@pytest.mark.parametrize(
    ("rounding", "num_kernels", "num_bytes"),
    [(Apart(), 396, 20.0), (PlainRounding(), 332, 17.68), (triton_fp8.TritonRounding(), 60, 8.97)],
    ids=["apart", "plain", "triton"],
)
def test_a_block_of_the_7b_is_rounded_in_so_many_passes(rounding: Rounding, num_kernels: int, num_bytes: float) -> None:
    """What docs/log.md says: of forward and backward, bytes for each value of the linears' x, weight and grad_y."""
    wide, narrow = (of_a_block(replace(OURS, **FUSED), products) for products in (NATIVE, Fp8Products(rounding)))
    shape = AQUILA_7B
    sizes = [
        (shape.hidden_size, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim),
        (shape.num_heads * shape.head_dim, shape.hidden_size),
        (shape.hidden_size, 2 * shape.ffn_size),
        (shape.ffn_size, shape.hidden_size),
    ]
    operands = sum(TOKENS * (inputs + outputs) + inputs * outputs for inputs, outputs in sizes)
    found = (narrow[1] - wide[1]) * TOKENS * HIDDEN * 2 / operands
    assert (narrow[0] - wide[0], round(found, 2)) == (num_kernels, num_bytes)
