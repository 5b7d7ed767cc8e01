"""The plain reference is itself held against transformers' Llama: the one model we did not write."""

import pytest
import torch

from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.verify.reference import plain_logits, plain_losses, plain_norm

transformers = pytest.importorskip("transformers")


def test_plain_model_is_transformers_llama_in_float64() -> None:
    shape = ModelShape(
        num_layers=2,
        hidden_size=32,
        ffn_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=61,
        padded_vocab_size=64,
        seq_len=12,
        norm_order="llama",
    )
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=shape.norm_eps,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double().eval()
    tokens = torch.randint(61, (2, 13))
    positions = torch.arange(12).expand(2, -1)
    ours = plain_logits(dict(model.named_parameters()), shape, tokens[:, :-1], positions)
    theirs = model(tokens[:, :-1]).logits
    # transformers computes rope in fp32 whatever the model's type: 12 positions * 2^-24 of the angle
    assert float((ours - theirs).detach().abs().max() / theirs.detach().abs().max()) < 1e-6
    losses = plain_losses(dict(model.named_parameters()), shape, tokens[:, :-1], tokens[:, 1:], positions)
    assert losses.shape == (2, 12)
    wrong = plain_logits(dict(model.named_parameters()), shape, tokens[:, :-1], positions * 2)
    assert float((wrong - theirs).abs().max() / theirs.abs().max()) > 1e-3, "positions would not matter"


def test_norm_orders_differ_only_where_the_type_is_narrow() -> None:
    shapes = {
        order: ModelShape(
            num_layers=1,
            hidden_size=64,
            ffn_size=64,
            num_heads=1,
            num_kv_heads=1,
            head_dim=64,
            vocab_size=8,
            padded_vocab_size=8,
            seq_len=8,
            norm_order=order,
        )
        for order in ("aquila", "llama")
    }
    torch.manual_seed(0)
    x, weight = torch.randn(32, 64, dtype=torch.float64), torch.rand(64, dtype=torch.float64)
    wide = [plain_norm(x, weight, shape) for shape in shapes.values()]
    assert torch.allclose(*wide, rtol=0, atol=1e-15)
    narrow = [plain_norm(x.bfloat16(), weight.bfloat16(), shape) for shape in shapes.values()]
    assert not torch.equal(*narrow)
