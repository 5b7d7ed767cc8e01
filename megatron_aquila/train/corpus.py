"""The run's data: sample indices of the blend, and loaders over them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_aquila.checkpoint.agree import agreed
from megatron_aquila.config.derive import Derived
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.data.blend import build_datasets, describe_data, parse_blend
from megatron_aquila.data.loader import BatchLoader, SegmentedSource
from megatron_aquila.data.samples import SampleSource
from megatron_aquila.data.sidecar import check_fingerprint, read_fingerprint
from megatron_aquila.data.tokenizer import fingerprint, load_tokenizer
from megatron_aquila.errors import ConfigError, Problem
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.train.launcher import Launch


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What the run reads, as kept in checkpoints: a run that continues must read the same.

    ``sets`` describes each data set without its place on disk, ``tokenizer`` is the fingerprint of the named
    files, or what the data says of itself; ``None`` where neither is there.
    """

    sets: list[dict[str, Any]]
    seq_len: int
    tokenizer: str | None

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """What is not as a checkpoint's ``asdict(identity)`` says, in words. A run may name no tokenizer."""
        found = []
        if saved["seq_len"] != self.seq_len:
            found.append(f"--seq-len {saved['seq_len']} there, {self.seq_len} here")
        if None not in (saved["tokenizer"], self.tokenizer) and saved["tokenizer"] != self.tokenizer:
            found.append("another tokenizer")
        if len(saved["sets"]) != len(self.sets):
            return [*found, f"{len(saved['sets'])} data sets there, {len(self.sets)} here"]
        for number, (there, here) in enumerate(zip(saved["sets"], self.sets, strict=True), start=1):
            found += [
                f"data set {number}: {name} {there[name]} there, {value} here"
                for name, value in here.items()
                if there[name] != value
            ]
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Loaders of this rank. ``valid`` is ``None`` where the split has no validation documents or none is wanted."""

    train: BatchLoader
    valid: BatchLoader | None
    source_names: tuple[str, ...]
    valid_samples: int
    identity: Identity | None  # on rank 0

    def close(self) -> None:
        """Stop reading ahead."""
        for loader in (self.train, self.valid):
            if loader is not None:
                loader.close()


def identify(config: RunConfig) -> Identity:
    """What the run reads, from the headers of its data and its tokenizer's files. Local.

    Raises ``ConfigError`` or ``DataError`` where the tokenizer does not fit the model or the data.
    """
    data = config.data
    prefixes = parse_blend(data.path)[0]
    tokenizer = read_fingerprint(prefixes)
    if any(
        path is not None for path in (data.vocab_file, data.merge_file, data.special_tokens_file, data.tokenizer_model)
    ):
        found = load_tokenizer(
            data.tokenizer_type,
            vocab_file=data.vocab_file,
            merge_file=data.merge_file,
            special_tokens_file=data.special_tokens_file,
            tokenizer_model=data.tokenizer_model,
        )
        if found.vocab_size != config.model.vocab_size:
            why = f"the tokenizer has {found.vocab_size} tokens"
            way_out = f"use --vocab-size {found.vocab_size}"
            raise ConfigError([Problem("--vocab-size", config.model.vocab_size, why, way_out)])
        tokenizer = fingerprint(found)
        check_fingerprint(prefixes, tokenizer)
    sets = describe_data(data.path, data.split)
    return Identity(sets=sets, seq_len=config.model.seq_len, tokenizer=tokenizer)


def build_corpus(
    config: RunConfig,
    derived: Derived,
    ctx: ParallelContext,
    launch: Launch,
    *,
    segments: tuple[int, ...],
    identity: Identity | None,
) -> Corpus:
    """Build the indices where they are missing and open them. Collective: the first rank of each node builds.

    ``segments`` are the index lengths of ``TrainState.index_segments``; segment k is shuffled with seed + k. Every
    validation reads the same first ``eval_iters`` global batches, so that its losses can be compared.
    """
    valid_samples = config.train.eval_iters * config.train.global_batch if config.train.eval_interval > 0 else 0

    def build(build_missing: bool) -> tuple[list[tuple[SampleSource, int]], SampleSource | None]:
        splits = [
            build_datasets(
                config.data.path,
                sizes=(length, valid_samples if index == 0 else 0, 0),
                split=config.data.split,
                seq_len=derived.shape.seq_len,
                seed=config.seed + index,
                cache_path=config.data.cache_path,
                build=build_missing,
            )
            for index, length in enumerate(segments)
        ]
        trains = [(split.train, length) for split, length in zip(splits, segments, strict=True)]
        return [(source, length) for source, length in trains if source is not None], splits[0].valid

    agreed(lambda: build(build_missing=True) if launch.local_rank == 0 else None, ctx.world)
    trains, valid_source = agreed(lambda: build(build_missing=False), ctx.world)
    train_source = SegmentedSource(trains)

    def loader(source: SampleSource, batch_at: Callable[[int], int]) -> BatchLoader:
        return BatchLoader(
            source,
            dp_rank=ctx.dp.rank,
            dp_size=ctx.dp.size,
            micro_batch=config.train.micro_batch,
            vocab_size=derived.shape.vocab_size,
            prefetch=config.data.prefetch,
            batch_at=batch_at,
        )

    wanted = valid_source is not None and valid_samples > 0
    return Corpus(
        train=loader(train_source, derived.batches.global_batch_at),
        valid=loader(valid_source, lambda _: config.train.global_batch)
        if wanted and valid_source is not None
        else None,
        source_names=tuple(train_source.names),
        valid_samples=valid_samples,
        identity=identity,
    )
