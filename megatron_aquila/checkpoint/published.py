"""Opening weights of any kind: which program wrote them is seen from what lies in the folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from megatron_aquila.checkpoint.aquila_2023 import aquila_map
from megatron_aquila.checkpoint.families import FAMILIES, Family, family_of_config
from megatron_aquila.checkpoint.folders import LATEST, MANIFEST
from megatron_aquila.checkpoint.foreign import ForeignReader, open_tables
from megatron_aquila.checkpoint.huggingface import HuggingFaceReader, read_json
from megatron_aquila.checkpoint.llama import llama_feature_problems, llama_tensors
from megatron_aquila.checkpoint.megatron import is_megatron, open_megatron
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.errors import CheckpointError
from megatron_aquila.plan.shape import ModelShape, NormOrder, PositionEmbedding, padded_vocab_size

ROWS: Final = 128  # a vocabulary is padded to a multiple of this
SAID: Final = "published"  # in a checkpoint's state
CONFIG, GENERATION = "config.json", "generation_config.json"
SPECIAL_IDS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")


def open_weights(
    folder: Path,
    *,
    family: str | None = None,
    position_embedding: PositionEmbedding | None = None,
    vocab_size: int | None = None,
) -> TensorReader:
    """The weights in ``folder``: a checkpoint of ours, Megatron's classic one, or published files of a known family.

    ``position_embedding``: the order of rotary pairs to have q and k in; default the files'. ``family`` and
    ``vocab_size`` stand in for what the files do not say. Raises CheckpointError where nothing is recognised.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; name one with weights")
    if (folder / MANIFEST).is_file() or (folder / LATEST).is_file():
        return CheckpointReader(folder)
    if is_megatron(folder):
        return open_megatron(folder, vocab_size=vocab_size, position_embedding=position_embedding)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: it holds no {MANIFEST} or {LATEST} (a checkpoint), no config.json (published weights) and no "
            "mp_rank_00 (Megatron's); name the folder with one of them"
        )
    config = read_json(folder / "config.json")
    known = FAMILIES[family] if family is not None else family_of_config(config)
    is_plain = known.name == "llama" and position_embedding in (None, "rope") and any(folder.glob("*.safetensors"))
    return open_llama(folder) if is_plain else open_family(folder, config, known, position_embedding)


def model_shape(reader: TensorReader, *, seq_len: int | None = None, norm_order: NormOrder | None = None) -> ModelShape:
    """The shape of the reader's model. ``norm_order`` stands in for what files of other programs do not say, which is
    guessed else; ``seq_len``, which they may say, is the longest sample. Raises CheckpointError where they say other.
    """
    if isinstance(reader, CheckpointReader):
        return reader.shape()
    said: Any = reader.shape_fields()
    if norm_order is not None and said.get("norm_order", norm_order) != norm_order:
        raise CheckpointError(f"--norm-order {norm_order}: {reader.folder} says {said['norm_order']}; leave it out")
    known = {"seq_len": seq_len, "norm_order": norm_order}
    given = {name: value for name, value in known.items() if value is not None}
    rows = padded_vocab_size(said["vocab_size"], ROWS)
    fields: dict[str, Any] = {"padded_vocab_size": rows, **reader.guessed_fields(), **said, **given}
    return ModelShape(**fields)


def said_by(reader: TensorReader) -> dict[str, Any]:
    """What published weights say beside their model, which a checkpoint made of them keeps: the special ids of
    config.json, and generation_config.json. Raises CheckpointError where one of them cannot be read.
    """
    if isinstance(reader, CheckpointReader):
        kept: Any = reader.state.get(SAID, {})
        return dict(kept)
    config, generation = (
        read_json(path) if (path := reader.folder / name).is_file() else {} for name in (CONFIG, GENERATION)
    )
    return {CONFIG: {name: config[name] for name in SPECIAL_IDS if name in config}, GENERATION: generation}


def end_ids(reader: TensorReader) -> frozenset[int]:
    """The tokens that end a text by what ``said_by`` gives: those of generation, else of config.json."""
    said = said_by(reader)
    found = [said.get(name, {}).get("eos_token_id") for name in (GENERATION, CONFIG)]
    ids: Any = next((one for one in found if one is not None), [])
    return frozenset([ids] if isinstance(ids, int) else ids)


def open_llama(folder: Path) -> HuggingFaceReader:
    """Published files of Llama's form. Raises CheckpointError where they ask for what is not offered."""
    reader = HuggingFaceReader(folder)
    problems = llama_feature_problems(reader.config)
    if not problems:
        fields: Any = reader.shape_fields()
        shape = ModelShape(**{**fields, "padded_vocab_size": fields["vocab_size"], "seq_len": 1})
        names = {name for name in reader.tensors if not name.endswith("rotary_emb.inv_freq")}
        problems = [f"{name} has no place in the model" for name in sorted(names - llama_tensors(shape).keys())]
    if problems:
        raise CheckpointError(f"{folder}: " + "; ".join(problems))
    return reader


def open_family(
    folder: Path, config: Mapping[str, Any], family: Family, position_embedding: PositionEmbedding | None
) -> ForeignReader:
    """Published files of ``family``. Raises CheckpointError where they ask for what is not offered or lack some."""
    problems = family.problems(config)
    if problems:
        raise CheckpointError(f"{folder}: " + "; ".join(problems))
    try:
        fields = family.shape_fields(config)
    except KeyError as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: it has no entry {error}; not of family {family.name}"
        ) from error
    form: Any = fields.get("position_embedding", "rope")
    if position_embedding is not None and "alibi" not in (form, position_embedding):
        form = position_embedding
    fields = {**fields, "position_embedding": form}
    whole: dict[str, Any] = {**fields, "padded_vocab_size": fields["vocab_size"], "seq_len": 1}
    found, theirs = open_tables(folder)
    is_packed = family.name == "aquila" and any("Wqkv" in key for key in found)
    shape = ModelShape(**whole)
    tensor_map = aquila_map(shape, packed=True) if is_packed else family.tensor_map(shape)
    return ForeignReader(folder, tensor_map, fields, found=found, theirs=theirs)
