"""Saving and restoring a run: joins the parameter table, the optimizer's ranges and the training state."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_aquila.checkpoint.huggingface import HuggingFaceReader
from megatron_aquila.checkpoint.layout import Chunk, param_chunks, range_chunks
from megatron_aquila.checkpoint.retention import prune
from megatron_aquila.checkpoint.store import CheckpointReader, save_checkpoint
from megatron_aquila.config.schema import DataConfig, RunConfig
from megatron_aquila.errors import CheckpointError
from megatron_aquila.model.init import initialize_
from megatron_aquila.parallel.collectives import barrier
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.train.build import Machine, lr_schedule
from megatron_aquila.train.state import TrainState

OPTIMIZER_KINDS = ("master", "exp_avg", "exp_avg_sq")


def save(machine: Machine, state: TrainState) -> Path:
    """Write a checkpoint of the logical model and prune old ones. Collective over the world.

    Each rank writes the elements of weights and optimizer states that its optimizer shard owns, so that the writing is
    spread over all data-parallel replicas.
    """
    root = machine.config.checkpoint.save
    assert root is not None, "save without --save"
    chunks = [
        chunk
        for kind, owned, values in machine.optimizer.ranges()
        if kind == "weight" or kind in OPTIMIZER_KINDS
        for chunk in range_chunks(owned, values, _prefix(kind))
    ]
    path = save_checkpoint(
        root, state.step, chunks, describe(machine.config, machine.derived.shape, state), machine.ctx
    )
    keep = machine.config.checkpoint.keep
    if keep is not None and machine.ctx.rank == 0:
        prune(root, keep)
    barrier(machine.ctx.world)
    return path


def _prefix(kind: str) -> str:
    return "" if kind == "weight" else f"optimizer.{kind}."


def describe(config: RunConfig, shape: ModelShape, state: TrainState) -> dict[str, Any]:
    """What a checkpoint says of its run beside the tensors; plain JSON values."""
    return {
        "train": state.to_json(),
        "shape": asdict(shape),
        "precision": config.train.precision,
        "optimizer": config.optim.optimizer,
        "lr_schedule": asdict(lr_schedule(config)),
        "data": {"path": list(config.data.path), "split": config.data.split},
        "tokenizer": tokenizer_files(config.data),
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


def fresh_state(config: RunConfig) -> TrainState:
    """The state of a run that has seen nothing."""
    return TrainState(seed=config.seed, index_segments=(config.train.train_samples,))


def read_state(config: RunConfig, shape: ModelShape) -> TrainState:
    """Where the run starts: the checkpoint's state, or a fresh one. Reads only the manifest.

    Raises ``CheckpointError`` where ``--load`` names nothing, or the checkpoint is of another model or schedule.
    """
    if config.checkpoint.load is None:
        return fresh_state(config)
    reader = CheckpointReader(config.checkpoint.load)
    saved: Mapping[str, Any] = reader.state
    problems = reader.shape_problems(shape)
    if problems:
        raise CheckpointError(
            f"--load {config.checkpoint.load}: another model: {'; '.join(problems)}; use its settings"
        )
    if not config.checkpoint.load_optim:
        return fresh_state(config)
    check_same_run(saved, config)
    return TrainState.from_json(saved["train"]).extended_to(config.train.train_samples)


def check_same_run(saved: Mapping[str, Any], config: RunConfig) -> None:
    """Raise ``CheckpointError`` where resuming would silently change the data order or the learning rate."""
    problems = []
    if saved["train"]["seed"] != config.seed:
        problems.append(f"--seed {config.seed}: the run was started with {saved['train']['seed']}")
    if saved["optimizer"] != config.optim.optimizer:
        problems.append(f"--optimizer {config.optim.optimizer}: the run was started with {saved['optimizer']}")
    if saved["precision"] != config.train.precision:
        problems.append(f"--precision {config.train.precision}: the run was started with {saved['precision']}")
    schedule = asdict(lr_schedule(config))
    changed = [name for name, value in schedule.items() if saved["lr_schedule"].get(name) != value]
    if changed and not config.checkpoint.override_lr_schedule:
        pairs = ", ".join(f"{name} {saved['lr_schedule'].get(name)} -> {schedule[name]}" for name in changed)
        problems.append(f"the learning-rate schedule differs ({pairs}): give --override-lr-schedule if that is meant")
    if problems:
        raise CheckpointError(f"--load {config.checkpoint.load}: " + "; ".join(problems))


def load_weights(machine: Machine, state: TrainState) -> None:
    """Fill parameters and optimizer from the checkpoint, the Hugging Face folder, or the seed.

    Collective over the world: each file is hashed once.

    Raises ``CheckpointError`` where a tensor is missing or of another shape; weights are never left random.
    """
    settings = machine.config.checkpoint
    if settings.load is not None:
        reader = CheckpointReader(settings.load)
        reader.verify_files(machine.ctx.world)
        reader.read_into(_weight_chunks(machine))
        if settings.load_optim:
            _load_optimizer(machine, reader, state)
            return
    elif settings.init_from_hf is not None:
        source = HuggingFaceReader(settings.init_from_hf)
        problems = source.shape_problems(machine.derived.shape)
        if problems:
            raise CheckpointError(f"--init-from-hf {settings.init_from_hf}: " + "; ".join(problems))
        source.read_into(_weight_chunks(machine), cast=True)
    else:
        initialize_(machine.infos, seed=machine.config.seed)
    machine.optimizer.refresh_masters()


def _weight_chunks(machine: Machine) -> list[Chunk]:
    for info in machine.infos:
        info.param.data.zero_()  # padded vocabulary rows are in no file
    return [chunk for info in machine.infos for chunk in param_chunks(info)]


def _load_optimizer(machine: Machine, reader: CheckpointReader, state: TrainState) -> None:
    chunks = [
        chunk
        for kind, owned, values in machine.optimizer.ranges()
        if kind in OPTIMIZER_KINDS
        for chunk in range_chunks(owned, values, _prefix(kind))
    ]
    reader.read_into(chunks)
    machine.optimizer.applied_steps = state.applied_steps
