"""Megatron-LM's classic checkpoints, FlagScale's among them: ``iter_N/mp_rank_TT[_PPP]/model_optim_rng.pt``."""

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_aquila.checkpoint.folders import write_text
from megatron_aquila.checkpoint.foreign import ForeignReader
from megatron_aquila.checkpoint.llama import NORM_ORDER
from megatron_aquila.checkpoint.manifest import StoredTensor
from megatron_aquila.checkpoint.megatron_form import NAMES, MegatronForm, Names, megatron_map
from megatron_aquila.checkpoint.pickles import flat, load_pickle
from megatron_aquila.errors import CheckpointError
from megatron_aquila.plan.shape import ModelShape, PositionEmbedding

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
_PART = re.compile(r"model\d*")


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
    rotary pairs to have q and k in. Raises CheckpointError where it is damaged or its model is another.
    """
    step = folder
    if (folder / TRACKER).is_file():
        word = (folder / TRACKER).read_text(encoding="utf-8").strip()
        step = folder / (f"iter_{int(word):07d}" if word.isdigit() else word)
    names = sorted(path.parent.name for path in step.glob("mp_rank_*/" + FILE))
    if not names:
        raise CheckpointError(f"{step}: it holds no mp_rank_TT/{FILE}")
    states = {name: load_pickle(step / name / FILE) for name in names}
    tensors = {f"{name}/{key}": x for name in names for key, x in _model(step / name / FILE, states[name]).items()}
    arguments = vars(states[names[0]]["args"])
    form = _form(step, tensors, arguments, patched)
    fields = _shape_fields(step, arguments, form, vocab_size)
    fields["position_embedding"] = form.positions if position_embedding in (None, "alibi") else position_embedding
    shape = ModelShape(**{"seq_len": 1, **fields, "padded_vocab_size": form.padded_vocab_size})
    found = {key: StoredTensor(tuple(x.shape), x.dtype, ()) for key, x in tensors.items()}
    theirs: Callable[[str], Tensor] = tensors.__getitem__
    # FlagScale's RMSNorm and Transformer Engine's cast after the weight, Megatron-LM's own classic one before it
    is_llama = form.names == "classic" and not arguments.get("apply_layernorm_rms") and "normalization" in arguments
    guessed = {"norm_order": "llama" if is_llama else "aquila"}
    return ForeignReader(step, megatron_map(shape, form), fields, found=found, theirs=theirs, guessed=guessed)


def _model(path: Path, state: Any) -> dict[str, Tensor]:
    """The tensors of a rank's file, of its one part or of its virtual stages. Raises CheckpointError."""
    parts = [key for key in state if _PART.fullmatch(str(key))] if isinstance(state, Mapping) else []
    if not parts or "args" not in state:
        raise CheckpointError(f"{path}: it has no `model` and `args`; only classic checkpoints are read")
    return {f"{part}/{key}": x for part in parts for key, x in flat(state[part]).items()}


def _form(
    step: Path, tensors: Mapping[str, Tensor], arguments: Mapping[str, Any], patched: bool | None
) -> MegatronForm:
    """What the names say: degrees, parts, and who named them. Raises CheckpointError where no names are known."""
    kind = next((kind for kind, names in NAMES.items() if _has(tensors, names)), None)
    if kind is None:
        some = ", ".join(sorted(key.rpartition("/")[2] for key in tensors)[:4])
        raise CheckpointError(f"{step}: its tensors have no names that are known here, but e.g. {some}")
    names, places = NAMES[kind], {tuple(key.split("/")[:2]) for key in tensors}
    ranks = [folder.split("_")[2:] for folder, _ in places]  # tp, and pp where there are several
    cut = MegatronForm(
        tp=len({tp for tp, *_ in ranks}),
        pp=len({tuple(pp) for _, *pp in ranks}),
        chunks=len({part for _, part in places}),
        padded_vocab_size=0,
    )
    prefixes = [f"{cut.place(0, part)}/{names.layers}." for part in range(cut.parts)]
    layers = [len({_number_after(prefix, key) for key in tensors if key.startswith(prefix)}) for prefix in prefixes]
    rows = [x.shape[0] for key, x in tensors.items() if key.endswith("/" + names.embedding)]
    is_patched = bool(arguments.get("rotary_interleaved_patch", False)) if patched is None else patched
    return replace(
        cut,
        padded_vocab_size=sum(rows),
        names=kind,
        layers=tuple(layers),
        positions="rope-interleaved" if arguments.get("rotary_interleaved") is True else "rope",
        patched=is_patched,
    )


def _number_after(prefix: str, key: str) -> str:
    return key.removeprefix(prefix).partition(".")[0]


def _has(tensors: Mapping[str, Tensor], names: Names) -> bool:
    """Whether layers have both of the names that tell the kinds apart."""
    return all(any(key.endswith(f".{name}") for key in tensors) for name in (names.qkv, names.input_norm))


def _shape_fields(
    step: Path, arguments: Mapping[str, Any], form: MegatronForm, vocab_size: int | None
) -> dict[str, Any]:
    """Of ``ModelShape``'s fields what Megatron's arguments say."""
    problems = [
        f"{flag} is not supported"
        for flag, is_wrong in {
            "--position-embedding-type learned_absolute": arguments.get("add_position_embedding") is True,
            "a model without --swiglu": arguments.get("swiglu") is False,
            "a model with biases (--disable-bias-linear)": arguments.get("add_bias_linear") is True,
            "a model with --add-qkv-bias": arguments.get("add_qkv_bias") is True,
            "a model with one table for embedding and head": arguments.get("untie_embeddings_and_output_weights")
            is False,
            "--apply-layernorm-1p": arguments.get("apply_layernorm_1p") is True,
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
    length = arguments.get("seq_length") or arguments.get("max_position_embeddings")
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
        **({"norm_order": arguments[NORM_ORDER]} if NORM_ORDER in arguments else {}),
        **({} if length is None else {"seq_len": int(length)}),
        **({"init_std": std} if (std := arguments.get("init_method_std")) is not None else {}),
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
        parts: dict[str, Any] = {}
        start = 0
        for key in keys:
            size = torch.Size(tensor_map.theirs[key])
            if tensor_map.sources_of(key):
                tensor_map.their_tensor(key, read, space[start : start + size.numel()].view(size))
            _, part, name = key.split("/", 2)
            (_put if form.names == "classic" else dict.__setitem__)(parts.setdefault(part, {}), name, (start, size))
            start += size.numel()
        state = {
            "args": _arguments(shape, form, dtype),
            "checkpoint_version": 3.0,
            "iteration": iteration,
            **_filled(parts, space),
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
        init_method_std=shape.init_std,
        rotary_base=shape.rope_base,
        rotary_interleaved_patch=form.patched,
        vocab_size=shape.vocab_size,
        padded_vocab_size=form.padded_vocab_size,
        tensor_model_parallel_size=form.tp,
        pipeline_model_parallel_size=form.pp,
        virtual_pipeline_model_parallel_size=form.chunks if form.chunks > 1 else None,
        use_mcore_models=form.names != "classic",
        add_position_embedding=False,
        use_rotary_position_embeddings=True,
        position_embedding_type="rope",
        rotary_interleaved=form.positions == "rope-interleaved",
        apply_layernorm_rms=True,
        normalization="RMSNorm",
        norm_order=shape.norm_order,
        swiglu=True,
        add_bias_linear=False,
        untie_embeddings_and_output_weights=True,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
    )
