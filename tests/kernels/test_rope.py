import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megatron_aquila.kernels.rope import apply_rope, rope_tables

HEAD_DIM, BASE = 16, 10000.0
POSITIONS_BS = torch.stack((torch.arange(4000, 4040), torch.arange(40)))  # two documents, one far along


def tables(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return rope_tables(POSITIONS_BS, head_dim=HEAD_DIM, base=BASE, dtype=dtype)


def test_equals_transformers_llama_to_the_bit_in_float32() -> None:
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": BASE}
    )
    x_SBND = torch.randn(40, 2, 4, HEAD_DIM)
    x_BNSD = x_SBND.permute(1, 2, 0, 3)
    theirs, _ = apply_rotary_pos_emb(x_BNSD, x_BNSD, *LlamaRotaryEmbedding(config)(x_BNSD, POSITIONS_BS))
    assert torch.equal(apply_rope(x_SBND, *tables(torch.float32)).permute(1, 2, 0, 3), theirs)


def test_is_a_rotation_of_each_pair_by_its_position() -> None:
    x = torch.randn(40, 2, 1, HEAD_DIM, dtype=torch.float64)
    pairs = torch.complex(*x.chunk(2, dim=-1))
    frequencies = BASE ** (-torch.arange(HEAD_DIM // 2, dtype=torch.float64) / (HEAD_DIM // 2))
    angles = POSITIONS_BS.T[:, :, None, None] * frequencies
    turned = torch.view_as_real(pairs * torch.exp(1j * angles))
    expected = torch.cat((turned[..., 0], turned[..., 1]), dim=-1)
    ours = apply_rope(x, *tables(torch.float64))
    assert (ours - expected).norm() <= 1e-13 * expected.norm()
    shifted = apply_rope(x, *rope_tables(POSITIONS_BS + 1, head_dim=HEAD_DIM, base=BASE, dtype=torch.float64))
    assert (shifted - expected).norm() > 1e-12 * expected.norm(), "positions off by one must show"


def test_gradient_turns_back_and_float64_stays_float64() -> None:
    cos, sin = tables(torch.float64)
    assert cos.dtype is sin.dtype is torch.float64
    x = torch.randn(40, 2, 3, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    grad_y = torch.randn_like(x)
    (grad_x,) = torch.autograd.grad(apply_rope(x, cos, sin), x, grad_y)
    torch.testing.assert_close(grad_x, apply_rope(grad_y, cos, -sin), rtol=0, atol=1e-14)


def test_bfloat16_rounds_once() -> None:
    x = torch.randn(40, 2, 3, HEAD_DIM).bfloat16()
    assert tables(torch.bfloat16)[0].dtype is torch.float32
    assert torch.equal(apply_rope(x, *tables(torch.bfloat16)), apply_rope(x.float(), *tables(torch.float32)).bfloat16())


def test_an_odd_head_dim_is_refused() -> None:
    with pytest.raises(AssertionError, match="head_dim 15 is odd"):
        rope_tables(POSITIONS_BS, head_dim=15, base=BASE, dtype=torch.float32)
