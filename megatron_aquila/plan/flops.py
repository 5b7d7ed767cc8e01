"""Parameters, FLOPs per token, device peaks and MFU: one definition each, the ones the run log prints.

A FLOP count here is what the model needs, not what is executed: recompute, norms and the optimizer are left out.
``plan.recompute`` counts what is computed a second time.
"""

from typing import Literal

from megatron_aquila.plan.shape import ModelShape, Precision

Attention = Literal["causal", "full"]


def layer_matmul_params(shape: ModelShape) -> int:
    """Elements of one layer's weight matrices: q, k, v, o, gate, up and down."""
    attention = shape.hidden_size * (2 * shape.attention_size + 2 * shape.kv_size)
    return attention + 3 * down_matmul_params(shape)


def down_matmul_params(shape: ModelShape) -> int:
    """Elements of the MLP's down projection; gate and up have as many each."""
    return shape.hidden_size * shape.ffn_size


def head_matmul_params(shape: ModelShape) -> int:
    """Elements of the LM head (and, untied from it, of the embedding), real vocabulary rows only."""
    return shape.vocab_size * shape.hidden_size


def matmul_params(shape: ModelShape) -> int:
    """Elements that take part in a matrix product: all layers and the head; the embedding is a look-up."""
    return shape.num_layers * layer_matmul_params(shape) + head_matmul_params(shape)


def num_params(shape: ModelShape) -> int:
    """Trained elements: matrices, embedding and the norms' weights, real vocabulary rows only."""
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    return matmul_params(shape) + head_matmul_params(shape) + norms


def attention_flops(attention_size: int, seq_len: int, attention: Attention = "causal") -> int:
    """FLOPs per token of one layer's two attention products, forward and backward.

    Full attention meets ``seq_len`` keys a query: ``12 * attention_size * seq_len``. Causally it meets half of them,
    the count of Megatron-LM and MaxText today.
    """
    return (6 if attention == "causal" else 12) * attention_size * seq_len


def flops_per_token(shape: ModelShape, attention: Attention = "causal") -> int:
    """FLOPs per token of a training step at ``shape.seq_len``: ``6 * matmul_params`` and the attention.

    ``"causal"`` is this project's MFU; ``"full"`` is the convention of PaLM and of NVIDIA's performance pages, given
    beside it for comparison with papers.
    """
    products = attention_flops(shape.attention_size, shape.seq_len, attention)
    return 6 * matmul_params(shape) + shape.num_layers * products


def layer_flops(shape: ModelShape) -> int:
    """FLOPs per token of one layer, forward and backward, attention counted causally."""
    return 6 * layer_matmul_params(shape) + attention_flops(shape.attention_size, shape.seq_len)


def head_flops(shape: ModelShape) -> int:
    """FLOPs per token of the LM head, forward and backward; about 2 layers of the 7B and 1.1 of the 34B."""
    return 6 * head_matmul_params(shape)


# Dense TFLOP/s by the words of the device's name, the more special names first. From the makers' data sheets, without
# sparsity. fp16 has the rate of bf16 on all of them. fp32 is the rate of the ordinary cores: this project does not
# switch TF32 on by itself.
_PEAKS: tuple[tuple[tuple[str, ...], dict[Precision, float]], ...] = (
    (("H100", "PCIE"), {"bf16": 756.5, "fp32": 51.2, "fp64": 51.2}),
    (("H100", "NVL"), {"bf16": 835.5, "fp32": 60.0, "fp64": 60.0}),
    (("H200", "NVL"), {"bf16": 835.5, "fp32": 60.0, "fp64": 60.0}),
    (("H100",), {"bf16": 989.4, "fp32": 66.9, "fp64": 66.9}),
    (("H200",), {"bf16": 989.4, "fp32": 66.9, "fp64": 66.9}),
    (("GH200",), {"bf16": 989.4, "fp32": 66.9, "fp64": 66.9}),
    (("H800",), {"bf16": 989.4, "fp32": 66.9}),
    (("H20",), {"bf16": 148.0, "fp32": 44.0}),
    (("A100",), {"bf16": 312.0, "fp32": 19.5, "fp64": 19.5}),
    (("A800",), {"bf16": 312.0, "fp32": 19.5, "fp64": 19.5}),
    (("A30",), {"bf16": 165.0, "fp32": 10.3, "fp64": 10.3}),
    (("A40",), {"bf16": 149.7, "fp32": 37.4}),
    (("A10",), {"bf16": 125.0, "fp32": 31.2}),
    (("L40S",), {"bf16": 362.05, "fp32": 91.6}),
    (("L4",), {"bf16": 121.0, "fp32": 30.3}),
    (("B200",), {"bf16": 2250.0}),
    (("MI300X",), {"bf16": 1307.4, "fp32": 163.4, "fp64": 163.4}),
    (("MI250X",), {"bf16": 383.0, "fp32": 95.7, "fp64": 95.7}),
)


def peak_flops(device_name: str, precision: Precision = "bf16") -> float | None:
    """Dense FLOP/s of a device such as ``"NVIDIA H100 80GB HBM3"``; ``None`` where no figure is known.

    Names match by whole words, so that an A10 is not an A100. Never the sparse figure. For fp8 it is the peak of bf16:
    some products stay in bf16, and shares are given as what bf16 would have had to reach.
    """
    words = set(device_name.upper().replace("-", " ").replace("/", " ").split())
    for name, peaks in _PEAKS:
        if words.issuperset(name):
            peak = peaks.get("bf16" if precision in ("fp16", "fp8") else precision)
            return None if peak is None else peak * 1e12
    return None


def mfu(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """Share of ``peak`` (FLOP/s of one device) that ``tokens_per_second`` of one device put to use, 0 to 1."""
    return tokens_per_second * flops_per_token / peak
