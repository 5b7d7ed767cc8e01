"""The data of a run that is looked at from outside: by its settings, or by what its checkpoints say."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

from megatron_aquila.checkpoint.folders import find_checkpoint
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.config.schema import DataConfig, ModelConfig, Phase, RunConfig, TrainConfig
from megatron_aquila.config.skips import left_out
from megatron_aquila.config.sources import number, split_of, training_blends
from megatron_aquila.data.progress import Report, ignore
from megatron_aquila.data.segments import SegmentedSource
from megatron_aquila.data.tokenizer import Tokenizer
from megatron_aquila.errors import CheckpointError, DataError
from megatron_aquila.observe.ledger import LEDGER_NAME, Ranges, read_ledger
from megatron_aquila.observe.lineage import left_out_after
from megatron_aquila.plan.batches import Batches, BatchPlan
from megatron_aquila.train.corpus import build_sources, first_segments, identify, named_tokenizer
from megatron_aquila.train.state import TrainState

RULES: Final = {  # flags, and the fields of DocumentRules that hold them
    "reset_position_ids": "reset_positions",
    "reset_attention_mask": "reset_attention",
    "eod_mask_loss": "mask_loss",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """What a run reads and when.

    ``batches`` begin at the first step of which it is known what it read. ``skipped`` are the half-open ranges of
    samples that are not trained on, ascending. ``tokenizer`` is ``None`` where the settings name none.
    """

    source: SegmentedSource
    batches: Batches
    skipped: Ranges
    tokenizer: Tokenizer | None

    def samples_of(self, step: int) -> range:
        """The samples of a step; the log's first is 1. Raises ``DataError`` where there is none, or it is not known."""
        place = bisect_right(self.batches, step - 1, key=itemgetter(0)) - 1
        if place < 0 < step:
            raise DataError(
                f"--step {step}: it is not known what the first {self.batches[0][0]} steps read: their batches were "
                "others, and checkpoints did not keep them then; ask for a --sample or a --document"
            )
        before, first, size = self.batches[max(place, 0)]
        start = first + (step - 1 - before) * size
        if step < 1 or start + size > len(self.source):
            raise DataError(f"--step {step}: the run's index of {len(self.source)} samples has no such step")
        return range(start, start + size)

    def step_of(self, sample: int) -> int | None:
        """The step that reads a sample; the log's first is 1. ``None`` where it is not known."""
        place = bisect_right(self.batches, sample, key=itemgetter(1)) - 1
        if place < 0:
            return None
        before, first, size = self.batches[place]
        return before + (sample - first) // size + 1

    def is_left_out(self, sample: int) -> bool:
        """Whether the run does not train on a sample."""
        return any(start <= sample < stop for start, stop in self.skipped)


def batch_plan(config: RunConfig) -> BatchPlan:
    """The batches of the run; which samples a step reads does not depend on the layout."""
    return BatchPlan(global_batch=config.train.global_batch, micro_batches=(1,), ramp=config.train.rampup_batch)


def trace_config(config: RunConfig, *, report: Report = ignore) -> Traced:
    """The run that the settings would start; indices are built where they are missing.

    Raises:
        ConfigError, DataError: as for a run.
    """
    segments = first_segments(config, batch_plan(config).end_of_run(0, config.train.train_samples))
    identify(config)
    return _open(config, TrainState(seed=config.seed, index_segments=segments).without(left_out(config.train)), report)


def trace_run(folder: Path, *, report: Report = ignore) -> Traced:
    """The run that wrote the checkpoints in ``folder``, which may be one of them.

    Raises:
        CheckpointError: there is no checkpoint, or it does not say what the run read.
        DataError: the data is no longer there, or no longer what the run read; or the run's ledger is damaged.
    """
    checkpoint = find_checkpoint(folder)
    saved: Mapping[str, Any] = CheckpointReader(checkpoint).state
    if not isinstance(saved.get("reads"), Mapping) or not isinstance(saved.get("data"), Mapping):
        raise CheckpointError(f"{checkpoint}: it does not say what its run read; give --config instead of --run")
    config, state = _config(saved), TrainState.from_json(saved["train"])
    different = identify(config).differences(saved["data"])
    if different:
        raise DataError(f"{checkpoint}: the data is not what the run read: {'; '.join(different)}")
    if (checkpoint.parent / LEDGER_NAME).exists():  # of a rewind since, which the next checkpoint will know of
        state = state.without(left_out_after(read_ledger(checkpoint.parent), checkpoint.name))
    return _open(config, state, report)


def batches_of(plan: BatchPlan, state: TrainState) -> Batches:
    """What steps took as ``state`` has it, and what is to come as ``plan`` has it.

    Checkpoints of before they were kept do not know what their steps took: it is the plan's, if with it the run stands
    where it stood, and else what is before is left out.
    """
    ahead = tuple(plan.batches_from(state.step, state.consumed_samples))
    kept = (*state.batches, *ahead)
    step, sample, _ = kept[0]
    planned = tuple(one for one in plan.batches_from(0, 0) if one[0] < step)
    if planned:
        before, first, size = planned[-1]
        kept = (*planned, *kept) if first + (step - before) * size == sample else kept
    return kept


def reads(config: RunConfig) -> dict[str, Any]:
    """What a checkpoint keeps so that its run's data can be found again; plain JSON, paths absolute."""
    first, *later = [(start, _absolute(path)) for start, path in training_blends(config.data)]
    cache = config.data.cache_path
    names = ("train_samples", "global_batch", "rampup_batch", "eval_interval", "eval_iters")
    return {
        "path": first[1],
        "valid_path": _absolute(config.data.valid_path),
        "phases": [{"from_samples": start, "path": path} for start, path in later],
        "split": split_of(config.data),
        "cache_path": None if cache is None else str(cache.resolve()),
        "train": {name: getattr(config.train, name) for name in names},
    }


def _absolute(blend: Sequence[str]) -> list[str]:
    return [word if number(word) is not None else str(Path(word).resolve()) for word in blend]


def _config(saved: Mapping[str, Any]) -> RunConfig:
    """The settings that decide what a run reads, from what ``train.resume.describe`` keeps of them."""
    read, data, named = saved["reads"], saved["data"], saved["tokenizer"]
    files: dict[str, Any] = {
        name: Path(named[name])
        for name in ("vocab_file", "merge_file", "special_tokens_file", "tokenizer_model")
        if named[name] is not None
    }
    present = all(path.exists() for path in files.values())
    rules = data["documents"]
    apart = (
        {} if rules is None else {"eod_token_id": rules["eod"], **{flag: rules[rule] for flag, rule in RULES.items()}}
    )
    ramp = read["train"]["rampup_batch"]
    return RunConfig(
        model=ModelConfig(seq_len=data["seq_len"], vocab_size=saved["shape"]["vocab_size"]),
        data=DataConfig(
            path=tuple(read["path"]),
            valid_path=tuple(read.get("valid_path", [])),  # which early checkpoints do not have
            phases=tuple(
                Phase(from_samples=phase["from_samples"], path=tuple(phase["path"])) for phase in read.get("phases", [])
            ),
            split=read["split"],
            cache_path=None if read["cache_path"] is None else Path(read["cache_path"]),
            tokenizer_type=named["tokenizer_type"],
            **(files if present else {}),
            **apart,
        ),
        train=TrainConfig(**read["train"] | {"rampup_batch": None if ramp is None else tuple(ramp)}),
        seed=saved["train"]["seed"],
    )


def _open(config: RunConfig, state: TrainState, report: Report) -> Traced:
    sources = build_sources(config, segments=state.index_segments, build=True, report=report)
    return Traced(
        source=sources.train,
        batches=batches_of(batch_plan(config), state),
        skipped=state.skipped_samples,
        tokenizer=named_tokenizer(config.data),
    )
