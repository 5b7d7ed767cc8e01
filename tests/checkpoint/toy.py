"""Local parameters of a small Llama by hand, under any layout, with values that depend on the logical tensor alone."""

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_aquila.checkpoint.layout import Chunk, param_chunks, range_chunks
from megatron_aquila.checkpoint.llama import llama_tensors
from megatron_aquila.parallel.params import Constant, FlatRange, ParamInfo, Part
from megatron_aquila.plan.shape import ModelShape

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=12,
    ffn_size=20,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=44,
    padded_vocab_size=64,
    seq_len=16,
)
SHAPES: Mapping[str, tuple[int, ...]] = llama_tensors(SHAPE)


def logical(name: str, dtype: torch.dtype) -> Tensor:
    """The whole logical tensor of this (prefixed) name."""
    shape = SHAPES[name[name.index("model.") :] if "model." in name else "lm_head.weight"]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def expected(chunk: Chunk) -> Tensor:
    """What the chunk's tensor must hold."""
    slices = tuple(slice(a, b) for a, b in zip(chunk.offset, chunk.rectangle.stop, strict=True))
    return logical(chunk.name, chunk.tensor.dtype)[slices]


def _split(name: str, tp_rank: int, tp: int, *, dim: int = 0, local_row: int = 0) -> Part:
    shape = list(SHAPES[name])
    shape[dim] //= tp
    offset = [0] * len(shape)
    offset[dim] = tp_rank * shape[dim]
    place = {"global_shape": SHAPES[name], "offset": tuple(offset), "shape": tuple(shape)}
    return Part(name=name, local_row=local_row, **place)


def _key_value(name: str, tp_rank: int, tp: int, local_row: int) -> Part:
    """A rank's key or value heads: with fewer heads than ranks, several ranks hold the same one."""
    copies = max(1, tp // SHAPE.num_kv_heads)
    rows = SHAPE.kv_size * copies // tp
    return Part(
        name=name,
        global_shape=SHAPES[name],
        offset=(tp_rank // copies * rows, 0),
        shape=(rows, SHAPE.hidden_size),
        local_row=local_row,
        replica=tp_rank % copies,
    )


def _vocab(name: str, tp_rank: int, tp: int) -> Part:
    """Real rows only; the last ranks may have none."""
    rows = SHAPE.padded_vocab_size // tp
    first = min(tp_rank * rows, SHAPE.vocab_size)
    real = min(rows, SHAPE.vocab_size - first)
    return Part(name=name, global_shape=SHAPES[name], offset=(first, 0), shape=(real, SHAPE.hidden_size))


def parameters(tp_rank: int, tp: int, dtype: torch.dtype, *, pp_rank: int = 0, pp: int = 1) -> list[ParamInfo]:
    """This rank's parameters, NaN everywhere: the embedding on the first stage, the head on the last."""
    infos: list[ParamInfo] = []

    def add(local_shape: tuple[int, ...], *parts: Part) -> None:
        param = nn.Parameter(torch.full(local_shape, math.nan, dtype=dtype))
        infos.append(ParamInfo(param=param, stage=pp_rank, weight_decay=True, init=Constant(0.0), parts=parts))

    vocab_shard = (SHAPE.padded_vocab_size // tp, SHAPE.hidden_size)
    if pp_rank == 0:
        add(vocab_shard, _vocab("model.embed_tokens.weight", tp_rank, tp))
    layers = SHAPE.num_layers // pp
    for number in range(pp_rank * layers, (pp_rank + 1) * layers):
        prefix = f"model.layers.{number}."
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            shape = (SHAPE.hidden_size,)
            add(shape, Part(name=prefix + norm, global_shape=shape, offset=(0,), shape=shape, replica=tp_rank))
        q = _split(prefix + "self_attn.q_proj.weight", tp_rank, tp)
        k = _key_value(prefix + "self_attn.k_proj.weight", tp_rank, tp, q.shape[0])
        v = _key_value(prefix + "self_attn.v_proj.weight", tp_rank, tp, q.shape[0] + k.shape[0])
        add((q.shape[0] + 2 * k.shape[0], SHAPE.hidden_size), q, k, v)
        o = _split(prefix + "self_attn.o_proj.weight", tp_rank, tp, dim=1)
        add(o.shape, o)
        gate = _split(prefix + "mlp.gate_proj.weight", tp_rank, tp)
        up = _split(prefix + "mlp.up_proj.weight", tp_rank, tp, local_row=gate.shape[0])
        add((2 * gate.shape[0], SHAPE.hidden_size), gate, up)
        down = _split(prefix + "mlp.down_proj.weight", tp_rank, tp, dim=1)
        add(down.shape, down)
    if pp_rank == pp - 1:
        shape = (SHAPE.hidden_size,)
        add(shape, Part(name="model.norm.weight", global_shape=shape, offset=(0,), shape=shape, replica=tp_rank))
        add(vocab_shard, _vocab("lm_head.weight", tp_rank, tp))
    return infos


def owned_ranges(infos: list[ParamInfo], dp_rank: int, dp: int) -> list[FlatRange]:
    """One rank's part of all parameters laid end to end and cut into ``dp`` equal ranges."""
    total = sum(info.param.numel() for info in infos)
    shard = math.ceil(total / dp)
    start, stop = dp_rank * shard, (dp_rank + 1) * shard
    out: list[FlatRange] = []
    at = 0
    for info in infos:
        size = info.param.numel()
        first, last = max(start, at), min(stop, at + size)
        if first < last:
            out.append(FlatRange(info, first - at, last - at))
        at += size
    return out


def optimizer_chunks(ranges: list[FlatRange], dtype: torch.dtype) -> list[Chunk]:
    """Moments of the ranges, NaN everywhere."""
    chunks: list[Chunk] = []
    for kind in ("exp_avg", "exp_avg_sq"):
        for one in ranges:
            values = torch.full((one.stop - one.start,), math.nan, dtype=dtype)
            chunks += range_chunks(one, values, f"optimizer.{kind}.")
    return chunks


def whole_chunks(infos: list[ParamInfo]) -> list[Chunk]:
    """All parameters."""
    return [chunk for info in infos for chunk in param_chunks(info)]


def fill(chunks: list[Chunk]) -> None:
    """Give every chunk its values."""
    for chunk in chunks:
        chunk.tensor.copy_(expected(chunk))


def assert_filled(chunks: list[Chunk]) -> None:
    """Every chunk holds its values, bit for bit."""
    for chunk in chunks:
        assert torch.equal(chunk.tensor, expected(chunk)), f"{chunk.name} at {chunk.offset} has other values"
