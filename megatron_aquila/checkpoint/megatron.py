"""Megatron-LM's classic checkpoints, FlagScale's among them: ``iter_N/mp_rank_TT[_PPP]/model_optim_rng.pt``.

Of each tensor-parallel rank, ``query_key_value`` holds group after group its query heads, its key and its value;
``dense_h_to_4h`` the rank's gate rows, then its up rows; the vocabulary is padded and split. Layers are counted anew on
every pipeline rank. FlagScale's 7B (``--rotary-interleaved-patch``) has the rows of v permuted with those of q and k,
from neighbours to halves, and puts its attention's output right; here v itself is.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_aquila.checkpoint.folders import write_text
from megatron_aquila.checkpoint.foreign import ForeignReader
from megatron_aquila.checkpoint.llama import llama_tensors
from megatron_aquila.checkpoint.manifest import StoredTensor
from megatron_aquila.checkpoint.pickles import flat, load_pickle
from megatron_aquila.checkpoint.strips import Strip, TensorMap, head_rows, row_strips, whole
from megatron_aquila.errors import CheckpointError
from megatron_aquila.plan.shape import ModelShape, PositionEmbedding

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
_LAYER = "language_model.encoder.layers"


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronForm:
    """How a checkpoint is cut: its degrees, and the rows of its padded vocabulary. ``patched``: v's rows permuted."""

    tp: int
    pp: int
    padded_vocab_size: int
    patched: bool = False

    def folder(self, tp_rank: int, pp_rank: int) -> str:
        """The folder of one rank; its pipeline rank is named where there are several."""
        return f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if self.pp > 1 else "")


def megatron_map(shape: ModelShape, form: MegatronForm) -> TensorMap:
    """Our tensors in the files of all ranks; a key is ``folder/name``. Raises CheckpointError for what does not divide.

    Norms stand on every tensor-parallel rank, and are read from the first.
    """
    sizes = {"num_kv_heads": (shape.num_kv_heads, form.tp), "ffn_size": (shape.ffn_size, form.tp)}
    sizes |= {"padded_vocab_size": (form.padded_vocab_size, form.tp), "num_layers": (shape.num_layers, form.pp)}
    bad = [f"{name} {size} by {degree}" for name, (size, degree) in sizes.items() if size % degree]
    if bad or form.padded_vocab_size < shape.vocab_size:
        problem = f"does not divide: {', '.join(bad)}" if bad else f"holds less than {shape.vocab_size} tokens"
        raise CheckpointError(f"Megatron's form tp {form.tp} pp {form.pp}, {form.padded_vocab_size} rows, {problem}")
    theirs: dict[str, tuple[int, ...]] = {}
    strips: list[Strip] = []
    for tp_rank in range(form.tp):
        for key, size, found in _rank(shape, form, tp_rank):
            theirs[key] = size
            strips += found
    return TensorMap(llama_tensors(shape), theirs, strips)


def _rank(shape: ModelShape, form: MegatronForm, rank: int) -> Iterator[tuple[str, tuple[int, ...], list[Strip]]]:
    """What one tensor-parallel rank holds, on all its pipeline ranks: key, shape, strips."""
    hidden, per_stage = shape.hidden_size, shape.num_layers // form.pp
    first, last = form.folder(rank, 0), form.folder(rank, form.pp - 1)
    ends = (
        ("model.embed_tokens.weight", f"{first}/language_model.embedding.word_embeddings.weight"),
        ("lm_head.weight", f"{last}/language_model.output_layer.weight"),
    )
    rows = form.padded_vocab_size // form.tp
    for name, key in ends:
        start, stop = (min(number * rows, shape.vocab_size) for number in (rank, rank + 1))
        found = row_strips(name, key, [(range(start, stop), range(stop - start))] if stop > start else [], hidden)
        yield key, (rows, hidden), [*found]
    yield _norm(shape, "model.norm.weight", f"{last}/language_model.encoder.final_layernorm.weight", rank)
    for layer in range(shape.num_layers):
        ours = f"model.layers.{layer}"
        theirs = f"{form.folder(rank, layer // per_stage)}/{_LAYER}.{layer % per_stage}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield _norm(shape, f"{ours}.{name}.weight", f"{theirs}.{name}.weight", rank)
        qkv = f"{theirs}.self_attention.query_key_value.weight"
        size = (shape.attention_size + 2 * shape.kv_size) // form.tp
        yield qkv, (size, hidden), [*_grouped(shape, form, ours, qkv, rank)]
        width = shape.ffn_size // form.tp
        up, mine = f"{theirs}.mlp.dense_h_to_4h.weight", range(rank * width, (rank + 1) * width)
        halves = {"gate_proj": range(width), "up_proj": range(width, 2 * width)}
        fused = [
            strip
            for name, rows_there in halves.items()
            for strip in row_strips(f"{ours}.mlp.{name}.weight", up, [(mine, rows_there)], hidden)
        ]
        yield up, (2 * width, hidden), fused
        yield _columns(f"{ours}.mlp.down_proj.weight", f"{theirs}.mlp.dense_4h_to_h.weight", hidden, width, rank)
        columns, dense = shape.attention_size // form.tp, f"{theirs}.self_attention.dense.weight"
        yield _columns(f"{ours}.self_attn.o_proj.weight", dense, hidden, columns, rank)


def _norm(shape: ModelShape, name: str, key: str, rank: int) -> tuple[str, tuple[int, ...], list[Strip]]:
    return key, (shape.hidden_size,), [whole(name, key, (shape.hidden_size,))]


def _columns(name: str, key: str, rows: int, width: int, rank: int) -> tuple[str, tuple[int, ...], list[Strip]]:
    mine = range(rank * width, (rank + 1) * width)
    return key, (rows, width), [Strip(name, key, (range(rows), mine), (range(rows), range(width)))]


def _grouped(shape: ModelShape, form: MegatronForm, ours: str, key: str, rank: int) -> Iterator[Strip]:
    """A rank's groups: their queries, their key, their value."""
    heads, dim, groups = shape.num_heads // shape.num_kv_heads, shape.head_dim, shape.num_kv_heads // form.tp
    here = shape.position_embedding
    for local in range(groups):
        group, start = rank * groups + local, local * (heads + 2) * dim
        # v alone has rows that no rotary pair explains, where the patch permuted them from neighbours to halves
        v_order: dict[str, Any] = {"ours": "rope-interleaved" if form.patched else here, "theirs": "rope"}
        v_order = v_order if form.patched else {"ours": here, "theirs": here}
        parts: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
            ("q_proj", heads, 0, {"ours": here, "theirs": "rope"}),
            ("k_proj", 1, heads, {"ours": here, "theirs": "rope"}),
            ("v_proj", 1, heads + 1, v_order),
        )
        for name, count, before, order in parts:
            rows = head_rows(count, dim, our_start=group * count * dim, their_start=start + before * dim, **order)
            yield from row_strips(f"{ours}.self_attn.{name}.weight", key, rows, shape.hidden_size)


def is_megatron(folder: Path) -> bool:
    """Whether the folder is a classic checkpoint, or the root of several."""
    return (folder / TRACKER).is_file() or any(folder.glob("mp_rank_*/" + FILE))


def open_megatron(
    folder: Path,
    *,
    vocab_size: int | None = None,
    patched: bool | None = None,
    position_embedding: PositionEmbedding | None = None,
) -> ForeignReader:
    """A classic checkpoint as logical tensors. Tensors are mapped, none is read yet.

    ``vocab_size`` and ``patched`` stand in for what its arguments do not say, ``position_embedding`` is the order of
    rotary pairs to have q and k in. Raises CheckpointError where it is
    damaged, interleaved over virtual stages, or its model is another.
    """
    step = folder
    if (folder / TRACKER).is_file():
        word = (folder / TRACKER).read_text(encoding="utf-8").strip()
        step = folder / (f"iter_{int(word):07d}" if word.isdigit() else word)
    names = sorted(path.parent.name for path in step.glob("mp_rank_*/" + FILE))
    if not names:
        raise CheckpointError(f"{step}: it holds no mp_rank_TT/{FILE}")
    states = {name: load_pickle(step / name / FILE) for name in names}
    first = states[names[0]]
    if not isinstance(first, Mapping) or "args" not in first or "model" not in first:
        way_out = "only classic checkpoints of one chunk a rank are read: convert it with --chunks 1 there"
        raise CheckpointError(f"{step / names[0] / FILE}: it has no `model` and `args`; {way_out}")
    tensors = {f"{name}/{key}": x for name in names for key, x in flat(states[name]["model"]).items()}
    arguments = vars(first["args"])
    tps = {int(name.split("_")[2]) for name in names}
    form = MegatronForm(
        tp=len(tps),
        pp=len(names) // len(tps),
        padded_vocab_size=tensors[f"{names[0]}/language_model.embedding.word_embeddings.weight"].shape[0] * len(tps),
        patched=bool(arguments.get("rotary_interleaved_patch", False)) if patched is None else patched,
    )
    fields = _shape_fields(step, arguments, vocab_size)
    fields["position_embedding"] = "rope" if position_embedding in (None, "alibi") else position_embedding
    shape = ModelShape(**{**fields, "padded_vocab_size": form.padded_vocab_size, "seq_len": _seq_len(arguments)})
    found = {key: StoredTensor(tuple(x.shape), x.dtype, ()) for key, x in tensors.items()}
    theirs: Callable[[str], Tensor] = tensors.__getitem__
    return ForeignReader(step, megatron_map(shape, form), fields, found=found, theirs=theirs)


def _seq_len(arguments: Mapping[str, Any]) -> int:
    return int(arguments.get("seq_length") or arguments.get("max_position_embeddings") or 2048)


def _shape_fields(step: Path, arguments: Mapping[str, Any], vocab_size: int | None) -> dict[str, Any]:
    """Of ``ModelShape``'s fields what Megatron's arguments say."""
    problems = [
        f"{flag} is not supported"
        for flag, is_wrong in {
            "--position-embedding-type learned_absolute": arguments.get("add_position_embedding") is True,
            "a model without --swiglu": arguments.get("swiglu") is False,
            "a model with biases (--disable-bias-linear)": arguments.get("add_bias_linear") is True,
            "a model with --add-qkv-bias": arguments.get("add_qkv_bias") is True,
            "--rotary-percent below 1": arguments.get("rotary_percent") not in (None, 1.0),
            "a model with stretched rotary positions": arguments.get("rotary_seq_len_interpolation_factor")
            not in (None, 1)
            or arguments.get("use_rope_scaling") is True,
        }.items()
        if is_wrong
    ]
    vocab = vocab_size if vocab_size is not None else arguments.get("vocab_size")
    if vocab is None:
        problems.append("it does not say how many tokens are real: give --vocab-size")
    if problems:
        raise CheckpointError(f"{step}: " + "; ".join(problems))
    heads = arguments["num_attention_heads"]
    groups = arguments.get("num_query_groups") if arguments.get("group_query_attention") else None
    head_dim = arguments.get("kv_channels")
    return {
        "num_layers": arguments["num_layers"],
        "hidden_size": arguments["hidden_size"],
        "ffn_size": arguments["ffn_hidden_size"],
        "num_heads": heads,
        "num_kv_heads": heads if groups is None else groups,
        "head_dim": arguments["hidden_size"] // heads if head_dim is None else head_dim,
        "vocab_size": vocab,
        "norm_eps": arguments.get("layernorm_epsilon", arguments.get("norm_epsilon", 1e-5)),
        "rope_base": float(arguments.get("rotary_base", 10000.0)),
        "norm_head": False,
    }


def write_megatron(
    folder: Path,
    shape: ModelShape,
    form: MegatronForm,
    read: Callable[[str], Tensor],
    *,
    iteration: int,
    dtype: torch.dtype,
    only: str,
) -> Path:
    """Write one rank's file, of the folder ``only``. A rank's tensors lie in a file while they are written, not in
    memory. Raises OSError.
    """
    tensor_map = megatron_map(shape, form)
    target = folder / f"iter_{iteration:07d}" / only / FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    keys = [key for key in tensor_map.theirs if key.startswith(f"{only}/")]
    scratch = target.with_suffix(".scratch")
    total = sum(torch.Size(tensor_map.theirs[key]).numel() for key in keys)
    scratch.unlink(missing_ok=True)  # of a run that was killed; padding is zeros
    try:
        space = torch.from_file(str(scratch), shared=True, size=total, dtype=dtype)
        model: dict[str, Any] = {}
        start = 0
        for key in keys:
            size = torch.Size(tensor_map.theirs[key])
            if tensor_map.sources_of(key):
                tensor_map.their_tensor(key, read, space[start : start + size.numel()].view(size))
            _put(model, key.partition("/")[2], (start, size))
            start += size.numel()
        state = {
            "args": _arguments(shape, form, dtype),
            "checkpoint_version": 3.0,
            "iteration": iteration,
            "model": _filled(model, space),
        }
        torch.save(state, target.with_suffix(".tmp"))
        target.with_suffix(".tmp").replace(target)
    finally:
        scratch.unlink(missing_ok=True)
    return target


def write_tracker(folder: Path, iteration: int) -> None:
    """Point Megatron at the iteration. Raises OSError."""
    write_text(folder / TRACKER, f"{iteration}\n")


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    """Into Megatron's nested tables: the encoder's names are flat, all others are not."""
    parts = name.split(".", 2)
    inner = tree.setdefault(parts[0], {}).setdefault(parts[1], {})
    if parts[1] == "embedding":
        table, weight = parts[2].split(".")
        inner.setdefault(table, {})[weight] = value
    else:
        inner[parts[2]] = value


def _filled(tree: Mapping[str, Any], space: Tensor) -> dict[str, Any]:
    """The tables with views of ``space``, which is saved as one storage."""
    return {
        name: _filled(value, space)
        if isinstance(value, Mapping)
        else space[value[0] : value[0] + value[1].numel()].view(value[1])
        for name, value in tree.items()
    }


def _arguments(shape: ModelShape, form: MegatronForm, dtype: torch.dtype) -> argparse.Namespace:
    """What Megatron compares with its flags, and what its converters ask for."""
    return argparse.Namespace(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        group_query_attention=shape.num_kv_heads != shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        seq_length=shape.seq_len,
        max_position_embeddings=shape.seq_len,
        layernorm_epsilon=shape.norm_eps,
        norm_epsilon=shape.norm_eps,
        rotary_base=shape.rope_base,
        rotary_interleaved_patch=form.patched,
        vocab_size=shape.vocab_size,
        padded_vocab_size=form.padded_vocab_size,
        tensor_model_parallel_size=form.tp,
        pipeline_model_parallel_size=form.pp,
        add_position_embedding=False,
        use_rotary_position_embeddings=True,
        apply_layernorm_rms=True,
        swiglu=True,
        add_bias_linear=False,
        untie_embeddings_and_output_weights=True,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
    )
