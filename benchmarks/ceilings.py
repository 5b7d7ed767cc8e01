"""``python -m benchmarks.ceilings``: what the GPU gives at best for a run's shapes. All else is a share of it."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import GpuOptions, Record, Run, find_device, options_of, result_file, sustained
from benchmarks.shapes import MODELS, TINY_MODELS, model_config
from megatron_aquila.config.derive import derive
from megatron_aquila.kernels.weight_gradient import accumulate_weight_gradient_
from megatron_aquila.plan.shape import ModelShape

BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
BACKWARD_PRODUCTS = 2.5  # attention's backward runs 5 products, one of them again, for forward's 2


@dataclass(frozen=True, kw_only=True)
class Options(GpuOptions):
    """Rates of matrix products, copies and attention at the sizes of the 7B and the 34B, sustained on random data."""

    seconds: float = 3.0
    """Seconds of each measurement, after as long a warm-up."""
    tokens: int = 8192
    """Tokens of a microbatch."""
    seq_lens: tuple[int, ...] = (2048, 4096, 8192)
    """Sequence lengths of attention."""
    copy_mib: int = 2048
    """Size of the tensor that is copied."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    options = options_of(Options, "ceilings", argv)
    device = find_device(options)
    if device is None:
        return 0
    record = Record("ceilings", settings=options, device=device, out=result_file("ceilings", options))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    measure_copy(record, options, device)
    for model in TINY_MODELS if options.tiny else MODELS:
        if model.endswith("-8"):
            continue  # a slice has the same products
        shape = derive(model_config(model), 1).shape
        measure_products(record, model, shape, options, device, dtype)
        measure_attention(record, model, shape, options, device, dtype)
    return 0


def measure_copy(record: Record, options: Options, device: torch.device) -> None:
    """The bandwidth of a copy: every byte is read and written."""
    source = torch.randn(options.copy_mib * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    seconds = sustained(lambda: target.copy_(source), device=device, seconds=options.seconds)
    record.add("copy", mib=options.copy_mib, seconds=seconds, tbytes_per_second=2 * source.nbytes / seconds / 1e12)


def linears(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Output and input features of every linear of the model."""
    return {
        "qkv": (shape.attention_size + 2 * shape.kv_size, shape.hidden_size),
        "out": (shape.hidden_size, shape.attention_size),
        "gate_up": (2 * shape.ffn_size, shape.hidden_size),
        "down": (shape.hidden_size, shape.ffn_size),
        "head": (shape.padded_vocab_size, shape.hidden_size),
    }


def measure_products(
    record: Record, model: str, shape: ModelShape, options: Options, device: torch.device, dtype: torch.dtype
) -> None:
    """Every linear's four products: forward, the gradients of its input and weight, and the latter summed in fp32."""
    for name, (n, k) in linears(shape).items():
        for product, run in products(options.tokens, n, k, device, dtype):
            seconds = sustained(run, device=device, seconds=options.seconds)
            tflops = 2 * options.tokens * n * k / seconds / 1e12
            sizes = {"tokens": options.tokens, "n": n, "k": k}
            record.add("gemm", model=model, linear=name, product=product, **sizes, seconds=seconds, tflops=tflops)


def products(tokens: int, n: int, k: int, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Run]]:
    """By name; the tensors are those of one linear."""
    x, grad_y = (torch.randn(tokens, width, device=device, dtype=dtype) for width in (k, n))
    weight = torch.randn(n, k, device=device, dtype=dtype)
    yield "forward", lambda: x @ weight.T
    yield "dgrad", lambda: grad_y @ weight
    yield "wgrad", lambda: grad_y.T @ x
    total = torch.zeros(n, k, device=device)
    yield "wgrad, added in fp32", lambda: accumulate_weight_gradient_(total, grad_y, x)


def measure_attention(
    record: Record, model: str, shape: ModelShape, options: Options, device: torch.device, dtype: torch.dtype
) -> None:
    """torch's attention by backend, forward and backward; a backend that cannot is a row without a time."""
    for seq_len in options.seq_lens:
        batch = max(1, options.tokens // seq_len)
        flops = 2 * batch * shape.num_heads * seq_len**2 * shape.head_dim  # causal: half of two products
        for name, backend in BACKENDS.items():
            where = {"model": model, "backend": name, "seq_len": seq_len, "batch": batch}
            try:
                forward, backward = attention(shape, batch, seq_len, backend, device, dtype)
            except RuntimeError as error:
                record.add("attention", **where, error=str(error).splitlines()[0])
                continue
            for direction, run, work in (
                ("forward", forward, flops),
                ("backward", backward, BACKWARD_PRODUCTS * flops),
            ):
                seconds = sustained(run, device=device, seconds=options.seconds)
                record.add("attention", **where, direction=direction, seconds=seconds, tflops=work / seconds / 1e12)


def attention(
    shape: ModelShape, batch: int, seq_len: int, backend: SDPBackend, device: torch.device, dtype: torch.dtype
) -> tuple[Run, Run]:
    """Causal attention of all heads, and its backward. Raises ``RuntimeError`` where the backend cannot."""

    def heads(count: int) -> Tensor:
        size = (batch, seq_len, count, shape.head_dim)
        return torch.randn(size, device=device, dtype=dtype).transpose(1, 2).requires_grad_()

    q, k, v = heads(shape.num_heads), heads(shape.num_kv_heads), heads(shape.num_kv_heads)

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape != q.shape)

    def forward() -> Tensor:
        with torch.no_grad():
            return run()

    out = run()
    grad = torch.randn_like(out)
    return forward, lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)


if __name__ == "__main__":
    sys.exit(main())
