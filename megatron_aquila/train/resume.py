"""Saving and restoring a run: joins the parameter table, the optimizer's ranges and the training state."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_aquila.checkpoint.agree import agreed
from megatron_aquila.checkpoint.layout import Chunk, param_chunks, range_chunks
from megatron_aquila.checkpoint.parts import part_chunks
from megatron_aquila.checkpoint.published import open_weights
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.checkpoint.shares import Shares
from megatron_aquila.checkpoint.staging import Staging
from megatron_aquila.checkpoint.store import CheckpointReader, Save
from megatron_aquila.config.schema import DataConfig, RunConfig
from megatron_aquila.errors import CheckpointError
from megatron_aquila.model.init import draw_
from megatron_aquila.parallel.params import FlatRange
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.train.build import Machine, lr_schedule
from megatron_aquila.train.corpus import Identity
from megatron_aquila.train.masters import conversions, read_states, read_weights
from megatron_aquila.train.start import Start, rope_way_out
from megatron_aquila.train.state import TrainState
from megatron_aquila.train.traced import reads

OPTIMIZER_KINDS = ("master", "remainder", "exp_avg", "exp_avg_sq")


def begin_save(
    machine: Machine,
    state: TrainState,
    identity: Identity | None,
    staging: Staging | None = None,
    shares: Shares | None = None,
) -> Save:
    """Begin a checkpoint of the logical model. Collective over the world; rank 0's ``identity`` is kept.

    With ``staging`` the run may go on at once. ``shares`` are those of ``run_chunks``, where they were agreed before.
    """
    root = machine.config.checkpoint.save
    assert root is not None, "save without --save"
    described = describe(machine.config, machine.derived.shape, state, identity)
    return Save(root, state.step, run_chunks(machine), described, machine.ctx.host_world, staging, shares)


def run_chunks(machine: Machine) -> list[Chunk]:
    """What this rank writes of a checkpoint. Local; waits for the weights.

    Ranks whose optimizer shards own the same take turns, so that the writing is spread over all data-parallel replicas.
    """
    copies = machine.ctx.copies
    return owned_chunks(machine)[copies.rank :: copies.size]


def owned_chunks(machine: Machine) -> list[Chunk]:
    """The elements of weights and optimizer states that this rank's optimizer shard owns, and what is not trained."""
    return [*weight_chunks(machine), *optimizer_chunks(machine)]


def weight_chunks(machine: Machine) -> list[Chunk]:
    """The weights among ``owned_chunks``, and what is not trained."""
    weights = [
        chunk
        for kind, owned, values in machine.optimizer.ranges()
        if kind == "weight"
        for chunk in range_chunks(owned, values)
    ]
    kept = [chunk for info in machine.infos if not info.param.requires_grad for chunk in param_chunks(info)]
    return [*weights, *kept]


def _prefix(kind: str) -> str:
    return f"optimizer.{kind}."


def describe(config: RunConfig, shape: ModelShape, state: TrainState, identity: Identity | None) -> dict[str, Any]:
    """What a checkpoint says of its run beside the tensors; plain JSON values."""
    return {
        "train": state.to_json(),
        "shape": asdict(shape),
        "precision": config.train.precision,
        "optimizer": config.optim.optimizer,
        "lr_schedule": asdict(lr_schedule(config)),
        "data": None if identity is None else asdict(identity),
        "reads": reads(config),
        "tokenizer": tokenizer_files(config.data) | {"fingerprint": None if identity is None else identity.tokenizer},
    }


def tokenizer_files(data: DataConfig) -> dict[str, str | None]:
    """The tokenizer's kind and files, as text."""
    files = {
        "vocab_file": data.vocab_file,
        "merge_file": data.merge_file,
        "special_tokens_file": data.special_tokens_file,
        "tokenizer_model": data.tokenizer_model,
    }
    named = {name: None if path is None else str(path.resolve()) for name, path in files.items()}
    return {"tokenizer_type": data.tokenizer_type, **named}


def load_weights(machine: Machine, start: Start) -> list[str]:
    """Fill parameters and optimizer from the checkpoint, the Hugging Face folder, or the seed.

    Returns what is kept in another way there than here, a line each. Collective over the world: what fails on one rank
    fails on all. The checkpoint's files were verified when it was chosen. Raises ``CheckpointError`` where a tensor is
    missing or of another shape; weights are never left random. Of sharded weights only shards are filled, and have
    memory.
    """
    world, init_from_hf = machine.ctx.world, machine.config.checkpoint.init_from_hf
    if start.checkpoint is None and init_from_hf is None:
        initialize(machine)
        return []
    chunks = [chunk for owned, values in emptied_weights(machine) for chunk in range_chunks(owned, values)]
    if start.is_part:
        return _load_part(machine, start)
    if start.checkpoint is not None:
        path = start.checkpoint
        reader = agreed(lambda: CheckpointReader(path, verified=True), world)
        split = start.with_optimizer and machine.config.optim.master_weights == "remainder"
        cast = not start.with_optimizer
        agreed(lambda: read_weights(reader, chunks, with_remainders=split, cast=cast), world)
    elif init_from_hf is not None:
        shape, same_positions = machine.derived.shape, not machine.config.checkpoint.override_rope

        def fill() -> None:
            published = open_published(init_from_hf, shape, same_positions=same_positions)
            published.read_into(chunks, cast=True)

        agreed(fill, world)
    machine.optimizer.refresh_masters()  # also where masters are read next: padded rows are in no file of theirs either
    if not start.with_optimizer:
        return []
    agreed(lambda: read_states(reader, optimizer_chunks(machine)), world)
    machine.optimizer.applied_steps = start.state.applied_steps
    return conversions(reader, machine.config.optim)


def _load_part(machine: Machine, start: Start) -> list[str]:
    """Fill what this rank's shards own from its part, and the weights of all replicas from theirs."""
    folder, world, optimizer = start.checkpoint, machine.ctx.world, machine.optimizer
    assert folder is not None, "a part without a folder"
    reader = agreed(lambda: CheckpointReader(folder, verified=True), world)
    optimizer.refresh_masters()  # padded rows are in no file
    agreed(lambda: reader.read_into(part_chunks(weight_chunks(machine))), world)
    optimizer.gather_shards()
    optimizer.refresh_masters()
    agreed(lambda: reader.read_into(part_chunks(optimizer_chunks(machine))), world)
    optimizer.applied_steps = start.state.applied_steps
    return []


def initialize(machine: Machine) -> None:
    """Fill parameters and masters from the seed. Local."""
    for owned, values in emptied_weights(machine):
        for chunk in range_chunks(owned, values):
            draw_(
                chunk.tensor,
                owned.info.init,
                seed=machine.config.seed,
                name=chunk.name,
                global_shape=chunk.global_shape,
                offset=chunk.offset,
            )
    machine.optimizer.refresh_masters()


def emptied_weights(machine: Machine) -> list[tuple[FlatRange, Tensor]]:
    """All that this rank keeps of the weights, trained or not, as flat views, zeroed: padded rows are in no file."""
    frozen = [info for info in machine.infos if not info.param.requires_grad]
    whole = [(FlatRange(info, 0, info.param.numel()), info.param.detach().view(-1)) for info in frozen]
    kept = [*machine.optimizer.kept_weights(), *whole]
    for _, values in kept:
        values.zero_()
    return kept


def check_published(config: RunConfig, shape: ModelShape, start: Start) -> None:
    """Raise ``CheckpointError`` where the run starts from a Hugging Face folder that is not there or of another model.

    Reads its headers. Local.
    """
    folder = config.checkpoint.init_from_hf
    if folder is not None and start.checkpoint is None:
        open_published(folder, shape, same_positions=not config.checkpoint.override_rope)


def open_published(folder: Path, shape: ModelShape, *, same_positions: bool = True) -> TensorReader:
    """A Hugging Face folder of a model of ``shape``. Raises ``CheckpointError`` naming every size that differs."""
    reader = open_weights(folder, position_embedding=shape.position_embedding)
    problems = reader.shape_problems(shape, same_positions=same_positions)
    if problems:
        raise CheckpointError(f"--init-from-hf {folder}: " + "; ".join(problems) + rope_way_out(problems))
    return reader


def optimizer_chunks(machine: Machine) -> list[Chunk]:
    """This rank's rectangles of masters and moments, as views to be written or filled."""
    return [
        chunk
        for kind, owned, values in machine.optimizer.ranges()
        if kind in OPTIMIZER_KINDS
        for chunk in range_chunks(owned, values, _prefix(kind))
    ]
