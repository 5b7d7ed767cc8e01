"""Stretched rotary positions against transformers' own frequencies and against the papers, pair by pair."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_aquila.checkpoint.llama import SpecialIds, llama_config
from megatron_aquila.kernels.rope import apply_rope, rope_tables
from megatron_aquila.kernels.rope_scaling import Scaling, rope_frequencies
from megatron_aquila.model.position import rope_scaling
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.verify.plain_rope import plain_frequency, plain_rotate

SHAPE = ModelShape(
    num_layers=1, hidden_size=256, ffn_size=256, num_heads=2, num_kv_heads=2, head_dim=128,
    vocab_size=8, padded_vocab_size=8, seq_len=8192,
)  # fmt: skip
STRETCHED = [
    SHAPE,
    replace(SHAPE, rope_scaling="linear", rope_factor=4.0),
    replace(SHAPE, rope_scaling="ntk", rope_factor=4.0),
    replace(SHAPE, rope_scaling="yarn", rope_factor=4.0, rope_trained_len=2048),
    replace(SHAPE, rope_scaling="llama3", rope_factor=8.0, rope_trained_len=1024, rope_base=5e5),
]
POSITIONS_BS = torch.tensor([[0, 1, 2047, 2048, 8191]])


def tables(shape: ModelShape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    base, scaling = shape.stretched_rope_base, rope_scaling(shape)
    return rope_tables(POSITIONS_BS, head_dim=shape.head_dim, base=base, dtype=dtype, scaling=scaling)


@pytest.mark.parametrize("shape", STRETCHED, ids=lambda shape: shape.rope_scaling)
def test_config_json_gives_transformers_the_same_tables(shape: ModelShape) -> None:
    config = LlamaConfig(**llama_config(shape, torch.float32, SpecialIds(bos=1, eos=2, pad=None)))
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(()), POSITIONS_BS)
    for ours, their in zip(tables(shape, torch.float32), theirs, strict=True):
        # An angle of 8191 radians has an fp32 step of 5e-4; frequencies may differ in their last bit.
        assert (ours.transpose(0, 1) - their).abs().max() <= 2e-3
    others = tables(replace(shape, rope_base=1.01 * shape.rope_base), torch.float32)
    assert (others[0].transpose(0, 1) - theirs[0]).abs().max() > 2e-2, "another base must show"


@pytest.mark.parametrize("shape", STRETCHED, ids=lambda shape: shape.rope_scaling)
def test_the_turn_of_a_head_is_that_of_the_papers(shape: ModelShape) -> None:
    x_BSND = torch.randn(1, 5, 2, shape.head_dim, dtype=torch.float64)
    expected = plain_rotate(x_BSND, POSITIONS_BS, shape)
    ours = apply_rope(x_BSND.transpose(0, 1), *tables(shape, torch.float64)).transpose(0, 1)
    assert (ours - expected).norm() <= 1e-11 * expected.norm()  # angles of 8191 radians: 8191 * 2^-53, some of them


def test_each_form_keeps_what_it_promises() -> None:
    plain, linear, ntk, yarn, llama3 = ([plain_frequency(one, pair) for pair in range(64)] for one in STRETCHED)
    assert linear == [turn / 4 for turn in plain]
    assert ntk[0] == plain[0]
    assert ntk[-1] == pytest.approx(plain[-1] / 4, rel=1e-12)
    assert yarn[0] == plain[0]
    assert yarn[-1] == pytest.approx(plain[-1] / 4, rel=1e-12)
    base_5e5 = [plain_frequency(replace(SHAPE, rope_base=5e5), pair) for pair in range(64)]
    assert (llama3[0], llama3[-1]) == (base_5e5[0], base_5e5[-1] / 8)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["linear", "yarn", "llama3"]),
    factor=st.floats(1, 64),
    length=st.integers(1, 100_000),
    head_dim=st.integers(1, 64).map(lambda half: 2 * half),
)
def test_frequencies_lie_between_plain_and_interpolated(kind: str, factor: float, length: int, head_dim: int) -> None:
    scaling = Scaling(kind=kind, factor=factor, trained_len=length)  # type: ignore[arg-type]
    found, plain = (
        rope_frequencies(head_dim, 10000.0, one, dtype=torch.float64, device=torch.device("cpu"))
        for one in (scaling, Scaling())
    )
    assert (found <= plain * (1 + 1e-12)).all()
    assert (found >= plain / factor * (1 - 1e-12)).all()
