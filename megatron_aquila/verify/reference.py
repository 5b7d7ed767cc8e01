"""The plain Aquila: one process, ordinary autograd, none of our collectives, kernels, layers or engine.

It is the other side of every parity check, so it shares no code with the model but the drawing of initial
weights: it is written from the definition.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_aquila.parallel.rng import normal_rectangle
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.verify.plain_rope import plain_rotate, plain_two_range_scores

Weights = Mapping[str, Tensor]  # Hugging Face Llama's names -> full logical tensors


def plain_weights(shape: ModelShape, *, seed: int) -> dict[str, Tensor]:
    """Whole initial weights in float64, by name and in forward order, drawn as the model's init draws them."""
    weights: dict[str, Tensor] = {}

    def normal(name: str, rows: int, columns: int, std: float) -> None:
        size = (rows, columns)
        drawn = normal_rectangle(name, seed=seed, global_shape=size, offset=(0, 0), shape=size, std=std)
        weights[name] = drawn.double()

    def norm(name: str) -> None:
        weights[name] = torch.full((shape.hidden_size,), shape.norm_init, dtype=torch.float64)

    std, out_std = shape.init_std, shape.init_std / (2 * shape.num_layers) ** 0.5
    normal("model.embed_tokens.weight", shape.vocab_size, shape.hidden_size, std)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        norm(f"{prefix}.input_layernorm.weight")
        normal(f"{prefix}.self_attn.q_proj.weight", shape.attention_size, shape.hidden_size, std)
        normal(f"{prefix}.self_attn.k_proj.weight", shape.kv_size, shape.hidden_size, std)
        normal(f"{prefix}.self_attn.v_proj.weight", shape.kv_size, shape.hidden_size, std)
        normal(f"{prefix}.self_attn.o_proj.weight", shape.hidden_size, shape.attention_size, out_std)
        norm(f"{prefix}.post_attention_layernorm.weight")
        normal(f"{prefix}.mlp.gate_proj.weight", shape.ffn_size, shape.hidden_size, std)
        normal(f"{prefix}.mlp.up_proj.weight", shape.ffn_size, shape.hidden_size, std)
        normal(f"{prefix}.mlp.down_proj.weight", shape.hidden_size, shape.ffn_size, out_std)
    norm("model.norm.weight")
    normal("lm_head.weight", shape.vocab_size, shape.hidden_size, std)
    return weights


def plain_documents(tokens_BS: Tensor, eod: int) -> Tensor:
    """The document of each token within its sample, counted from 0: how many ends of documents stand before it."""
    return torch.stack([(tokens_BS[:, :place] == eod).sum(1) for place in range(tokens_BS.shape[1])], dim=1)


def plain_positions(documents_BS: Tensor) -> Tensor:
    """How many earlier tokens of its document a token has."""
    same_BSS = documents_BS[:, :, None] == documents_BS[:, None, :]
    return same_BSS.tril(-1).sum(-1)


def plain_logits(
    weights: Weights,
    shape: ModelShape,
    tokens_BS: Tensor,
    positions_BS: Tensor,
    documents_BS: Tensor | None = None,
    outputs: dict[str, Tensor] | None = None,
) -> Tensor:
    """tokens_BS -> logits_BSV over the real vocabulary, in the weights' dtype (norms and rope at least fp32).

    With ``documents_BS`` no token attends to one of another document of its sample. ``outputs`` is filled with what the
    layers give, each (B, S, H).
    """
    outputs = {} if outputs is None else outputs
    if documents_BS is None:
        documents_BS = torch.zeros_like(tokens_BS)
    x = outputs["model.embed_tokens"] = F.embedding(tokens_BS, weights["model.embed_tokens.weight"])
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        normed = plain_norm(x, weights[f"{prefix}.input_layernorm.weight"], shape)
        mixed = _attention(weights, f"{prefix}.self_attn", shape, normed, positions_BS, documents_BS)
        x = x + outputs.setdefault(f"{prefix}.self_attn", mixed)
        normed = plain_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], shape)
        gate = F.linear(normed, weights[f"{prefix}.mlp.gate_proj.weight"])
        up = F.linear(normed, weights[f"{prefix}.mlp.up_proj.weight"])
        down = F.linear(gate * torch.sigmoid(gate) * up, weights[f"{prefix}.mlp.down_proj.weight"])
        x = x + outputs.setdefault(f"{prefix}.mlp", down)
    x = outputs["model.norm"] = plain_norm(x, weights["model.norm.weight"], shape)
    head = weights["lm_head.weight"]
    return F.linear(x, head / head.square().sum(1, keepdim=True).sqrt() if shape.norm_head else head)


def plain_losses(
    weights: Weights,
    shape: ModelShape,
    tokens_BS: Tensor,
    labels_BS: Tensor,
    positions_BS: Tensor,
    documents_BS: Tensor | None = None,
    outputs: dict[str, Tensor] | None = None,
) -> Tensor:
    """Every token's negative log-likelihood in nats, loss_BS, unmasked, and what the max-z loss adds to it.

    ``outputs`` as of ``plain_logits``.
    """
    logits = plain_logits(weights, shape, tokens_BS, positions_BS, documents_BS, outputs)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss_BS = F.cross_entropy(logits.flatten(0, 1), labels_BS.flatten(), reduction="none").view_as(labels_BS)
    return loss_BS + shape.max_z_loss * logits.amax(-1) ** 2


def plain_losses_alone(
    weights: Weights, shape: ModelShape, tokens_BS: Tensor, labels_BS: Tensor, documents_BS: Tensor
) -> Tensor:
    """``plain_losses`` with every document as a sample of its own: what masks inside a sample must come to."""

    def alone(sample: int, document: int) -> Tensor:
        rows = documents_BS[sample] == document
        tokens, labels = tokens_BS[sample, rows][None], labels_BS[sample, rows][None]
        return plain_losses(weights, shape, tokens, labels, torch.arange(tokens.shape[1])[None])[0]

    last = documents_BS[:, -1].tolist()
    return torch.stack(
        [torch.cat([alone(sample, document) for document in range(n + 1)]) for sample, n in enumerate(last)]
    )


def plain_norm(x: Tensor, weight: Tensor, shape: ModelShape) -> Tensor:
    """RMSNorm over the last dim, cast where ``shape.norm_order`` says (Zhang & Sennrich 2019)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + shape.norm_eps).sqrt()
    if shape.norm_order == "llama":
        return weight * normed.to(x.dtype)
    return (weight.to(wide.dtype) * normed).to(x.dtype)


def plain_slopes(num_heads: int) -> list[float]:
    """ALiBi's slopes, by the recursion of its authors' code: where n is no power of two, the power below it, and every
    other slope of twice as many heads.
    """
    if num_heads & (num_heads - 1) == 0:
        ratio = 2 ** (-8 / num_heads)
        return [ratio ** (head + 1) for head in range(num_heads)]
    below = 1 << (num_heads.bit_length() - 1)
    return plain_slopes(below) + plain_slopes(2 * below)[::2][: num_heads - below]


def _attention(
    weights: Weights, prefix: str, shape: ModelShape, x_BSH: Tensor, positions_BS: Tensor, documents_BS: Tensor
) -> Tensor:
    """Causal attention with the whole score matrix; query head n uses key head n // (N / K)."""
    q, k, v = (
        F.linear(x_BSH, weights[f"{prefix}.{name}_proj.weight"]).view(*x_BSH.shape[:2], -1, shape.head_dim)
        for name in "qkv"
    )
    is_two_range = shape.rope_scaling == "two-range"
    if shape.position_embedding != "alibi" and not is_two_range:
        q, k = plain_rotate(q, positions_BS, shape), plain_rotate(k, positions_BS, shape)
    group = shape.num_heads // shape.num_kv_heads
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    products = plain_two_range_scores(q, k, shape) if is_two_range else torch.einsum("bsnd,btnd->bnst", q, k)
    scores = products / shape.head_dim**0.5
    if shape.score_clamp is not None:
        scores = scores.minimum(scores.new_tensor(shape.score_clamp)).maximum(scores.new_tensor(-shape.score_clamp))
    if shape.position_embedding == "alibi":
        place = torch.arange(x_BSH.shape[1], dtype=scores.dtype, device=scores.device)
        scores = scores - scores.new_tensor(plain_slopes(shape.num_heads))[:, None, None] * (place[:, None] - place)
    future = torch.ones(x_BSH.shape[1], x_BSH.shape[1], dtype=torch.bool, device=x_BSH.device).triu(1)
    foreign = documents_BS[:, None, :, None] != documents_BS[:, None, None, :]
    wide = torch.promote_types(scores.dtype, torch.float32)
    probs = scores.to(wide).masked_fill(future | foreign, float("-inf")).softmax(-1).to(x_BSH.dtype)
    mixed = torch.einsum("bnst,btnd->bsnd", probs, v).flatten(2)
    return F.linear(mixed, weights[f"{prefix}.o_proj.weight"])
