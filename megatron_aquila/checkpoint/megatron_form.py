"""How Megatron-LM's checkpoints cut and name a model: rows, ranks, virtual stages, and names old and new.

Of each tensor-parallel rank, the fused projection holds group after group its query heads, its key and its value; the
MLP's first matrix the rank's gate rows, then its up rows; the vocabulary is padded and split. A pipeline rank has one
part of the layers, or with virtual stages several: parts go round the ranks, chunk after chunk. Every part counts its
layers anew. FlagScale's 7B (``--rotary-interleaved-patch``) has the rows of v permuted with those of q and k, from
neighbours to halves, and puts its attention's output right; here v itself is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from megatron_aquila.checkpoint.llama import llama_tensors
from megatron_aquila.checkpoint.strips import Strip, TensorMap, head_rows, row_strips, whole
from megatron_aquila.errors import CheckpointError
from megatron_aquila.plan.shape import ModelShape, PositionEmbedding

NamesKind = Literal["classic", "core", "core-local"]
Tensors = Iterator[tuple[str, tuple[int, ...], list[Strip]]]  # key, shape, strips


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """What tensors are called; those of a layer behind ``layers`` and its number."""

    embedding: str
    norm: str
    head: str
    layers: str
    input_norm: str
    qkv: str
    attention_out: str
    mlp_norm: str
    mlp_in: str
    mlp_out: str


_CORE = {
    "embedding": "embedding.word_embeddings.weight",
    "norm": "decoder.final_layernorm.weight",
    "head": "output_layer.weight",
    "layers": "decoder.layers",
    "qkv": "self_attention.linear_qkv.weight",
    "attention_out": "self_attention.linear_proj.weight",
    "mlp_in": "mlp.linear_fc1.weight",
    "mlp_out": "mlp.linear_fc2.weight",
}
NAMES: Mapping[NamesKind, Names] = MappingProxyType(
    {
        "classic": Names(
            embedding="language_model.embedding.word_embeddings.weight",
            norm="language_model.encoder.final_layernorm.weight",
            head="language_model.output_layer.weight",
            layers="language_model.encoder.layers",
            input_norm="input_layernorm.weight",
            qkv="self_attention.query_key_value.weight",
            attention_out="self_attention.dense.weight",
            mlp_norm="post_attention_layernorm.weight",
            mlp_in="mlp.dense_h_to_4h.weight",
            mlp_out="mlp.dense_4h_to_h.weight",
        ),
        # Transformer Engine's layers have the norm before them in them, Megatron's own do not
        "core": Names(
            **_CORE,
            input_norm="self_attention.linear_qkv.layer_norm_weight",
            mlp_norm="mlp.linear_fc1.layer_norm_weight",
        ),
        "core-local": Names(**_CORE, input_norm="input_layernorm.weight", mlp_norm="pre_mlp_layernorm.weight"),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronForm:
    """How a checkpoint is cut: its degrees, virtual stages a pipeline rank, and the rows of its padded vocabulary.

    ``layers``: those of each part in the order of the network; empty where all have as many. ``positions``: the order
    of rotary pairs in q and k. ``patched``: v's rows are permuted.
    """

    tp: int
    pp: int
    padded_vocab_size: int
    chunks: int = 1
    names: NamesKind = "classic"
    layers: tuple[int, ...] = ()
    positions: PositionEmbedding = "rope"
    patched: bool = False

    def __str__(self) -> str:
        return f"{self.names} tp {self.tp} pp {self.pp} chunks {self.chunks}, {self.padded_vocab_size} rows"

    @property
    def parts(self) -> int:
        """Parts of the layers on all pipeline ranks."""
        return self.pp * self.chunks

    def folder(self, tp_rank: int, pp_rank: int) -> str:
        """The folder of one rank; its pipeline rank is named where there are several."""
        return f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if self.pp > 1 else "")

    def place(self, tp_rank: int, part: int) -> str:
        """The rank's folder, and the name of the part in its file."""
        chunk, pp_rank = divmod(part, self.pp)
        return f"{self.folder(tp_rank, pp_rank)}/{'model' if self.chunks == 1 else f'model{chunk}'}"

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """How many layers each part has."""
        return self.layers if self.layers else (num_layers // self.parts,) * self.parts


def megatron_map(shape: ModelShape, form: MegatronForm) -> TensorMap:
    """Our tensors in the files of all ranks; a key is ``folder/part/name``. Raises CheckpointError for what does not
    divide.

    Norms stand on every tensor-parallel rank, and are read from the first.
    """
    sizes = {"num_kv_heads": (shape.num_kv_heads, form.tp), "ffn_size": (shape.ffn_size, form.tp)}
    sizes |= {"padded_vocab_size": (form.padded_vocab_size, form.tp)}
    sizes |= {"num_layers": (shape.num_layers, form.parts)} if not form.layers else {}
    bad = [f"{name} {size} by {degree}" for name, (size, degree) in sizes.items() if size % degree]
    if form.layers and sum(form.layers) != shape.num_layers:
        raise CheckpointError(f"Megatron's files hold {sum(form.layers)} layers, their arguments {shape.num_layers}")
    if bad or form.padded_vocab_size < shape.vocab_size:
        problem = f"does not divide: {', '.join(bad)}" if bad else f"holds less than {shape.vocab_size} tokens"
        raise CheckpointError(f"Megatron's form {form}, {problem}")
    theirs: dict[str, tuple[int, ...]] = {}
    strips: list[Strip] = []
    for rank in range(form.tp):
        for key, size, found in _rank(shape, form, rank):
            theirs[key] = size
            strips += found
    return TensorMap(llama_tensors(shape), theirs, strips)


def _rank(shape: ModelShape, form: MegatronForm, rank: int) -> Tensors:
    """What one tensor-parallel rank holds, on all its pipeline ranks."""
    names, number = NAMES[form.names], 0
    first, last = form.place(rank, 0), form.place(rank, form.parts - 1)
    yield _vocabulary(shape, form, "model.embed_tokens.weight", f"{first}/{names.embedding}", rank)
    yield _vocabulary(shape, form, "lm_head.weight", f"{last}/{names.head}", rank)
    yield _norm(shape, "model.norm.weight", f"{last}/{names.norm}")
    for part, count in enumerate(form.layers_of(shape.num_layers)):
        for local in range(count):
            theirs = f"{form.place(rank, part)}/{names.layers}.{local}"
            yield from _layer(shape, form, f"model.layers.{number}", theirs, rank)
            number += 1


def _layer(shape: ModelShape, form: MegatronForm, ours: str, theirs: str, rank: int) -> Tensors:
    names, hidden = NAMES[form.names], shape.hidden_size
    yield _norm(shape, f"{ours}.input_layernorm.weight", f"{theirs}.{names.input_norm}")
    yield _norm(shape, f"{ours}.post_attention_layernorm.weight", f"{theirs}.{names.mlp_norm}")
    qkv, size = f"{theirs}.{names.qkv}", (shape.attention_size + 2 * shape.kv_size) // form.tp
    yield qkv, (size, hidden), [*_grouped(shape, form, ours, qkv, rank)]
    width = shape.ffn_size // form.tp
    up, mine = f"{theirs}.{names.mlp_in}", range(rank * width, (rank + 1) * width)
    halves = {"gate_proj": range(width), "up_proj": range(width, 2 * width)}
    fused = [
        strip
        for name, rows_there in halves.items()
        for strip in row_strips(f"{ours}.mlp.{name}.weight", up, [(mine, rows_there)], hidden)
    ]
    yield up, (2 * width, hidden), fused
    yield _columns(f"{ours}.mlp.down_proj.weight", f"{theirs}.{names.mlp_out}", hidden, width, rank)
    columns = shape.attention_size // form.tp
    yield _columns(f"{ours}.self_attn.o_proj.weight", f"{theirs}.{names.attention_out}", hidden, columns, rank)


def _vocabulary(
    shape: ModelShape, form: MegatronForm, name: str, key: str, rank: int
) -> tuple[str, tuple[int, ...], list[Strip]]:
    rows = form.padded_vocab_size // form.tp
    start, stop = (min(number * rows, shape.vocab_size) for number in (rank, rank + 1))
    real = [(range(start, stop), range(stop - start))] if stop > start else []
    return key, (rows, shape.hidden_size), [*row_strips(name, key, real, shape.hidden_size)]


def _norm(shape: ModelShape, name: str, key: str) -> tuple[str, tuple[int, ...], list[Strip]]:
    return key, (shape.hidden_size,), [whole(name, key, (shape.hidden_size,))]


def _columns(name: str, key: str, rows: int, width: int, rank: int) -> tuple[str, tuple[int, ...], list[Strip]]:
    mine = range(rank * width, (rank + 1) * width)
    return key, (rows, width), [Strip(name, key, (range(rows), mine), (range(rows), range(width)))]


def _grouped(shape: ModelShape, form: MegatronForm, ours: str, key: str, rank: int) -> Iterator[Strip]:
    """A rank's groups: their queries, their key, their value."""
    heads, dim, groups = shape.num_heads // shape.num_kv_heads, shape.head_dim, shape.num_kv_heads // form.tp
    turned: dict[str, Any] = {"ours": shape.position_embedding, "theirs": form.positions}
    # v alone has rows that no rotary pair explains, where the patch permuted them from neighbours to halves
    v_order = {"ours": "rope-interleaved", "theirs": "rope"} if form.patched else {"ours": "rope", "theirs": "rope"}
    parts: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
        ("q_proj", heads, 0, turned),
        ("k_proj", 1, heads, turned),
        ("v_proj", 1, heads + 1, v_order),
    )
    for local in range(groups):
        group, start = rank * groups + local, local * (heads + 2) * dim
        for name, count, before, order in parts:
            rows = head_rows(count, dim, our_start=group * count * dim, their_start=start + before * dim, **order)
            yield from row_strips(f"{ours}.self_attn.{name}.weight", key, rows, shape.hidden_size)
