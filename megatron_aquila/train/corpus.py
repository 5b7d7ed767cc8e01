"""The run's data: sample indices of the blend, and loaders over them."""

from dataclasses import dataclass

from megatron_aquila.config.derive import Derived
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.data.blend import build_datasets
from megatron_aquila.data.loader import BatchLoader, SegmentedSource
from megatron_aquila.data.samples import SampleSource
from megatron_aquila.data.tokenizer import load_tokenizer
from megatron_aquila.errors import ConfigError, Problem
from megatron_aquila.parallel.collectives import barrier
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.train.launcher import Launch


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Loaders of this rank. ``valid`` is ``None`` where the split has no validation documents or none is wanted."""

    train: BatchLoader
    valid: BatchLoader | None
    source_names: tuple[str, ...]
    valid_samples: int

    def close(self) -> None:
        """Stop reading ahead."""
        for loader in (self.train, self.valid):
            if loader is not None:
                loader.close()


def check_tokenizer(config: RunConfig) -> None:
    """Raise ``ConfigError`` where the named tokenizer has another vocabulary than the model. None named: no check."""
    data = config.data
    if all(path is None for path in (data.vocab_file, data.merge_file, data.special_tokens_file, data.tokenizer_model)):
        return
    found = load_tokenizer(
        data.tokenizer_type,
        vocab_file=data.vocab_file,
        merge_file=data.merge_file,
        special_tokens_file=data.special_tokens_file,
        tokenizer_model=data.tokenizer_model,
    ).vocab_size
    if found != config.model.vocab_size:
        why = f"the tokenizer has {found} tokens"
        raise ConfigError([Problem("--vocab-size", config.model.vocab_size, why, f"use --vocab-size {found}")])


def build_corpus(
    config: RunConfig, derived: Derived, ctx: ParallelContext, launch: Launch, *, segments: tuple[int, ...]
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

    if launch.local_rank == 0:
        build(build_missing=True)
    barrier(ctx.world)
    trains, valid_source = build(build_missing=False)
    train_source = SegmentedSource(trains)

    def loader(source: SampleSource) -> BatchLoader:
        return BatchLoader(
            source,
            dp_rank=ctx.dp.rank,
            dp_size=ctx.dp.size,
            micro_batch=config.train.micro_batch,
            vocab_size=derived.shape.vocab_size,
            prefetch=config.data.prefetch,
            batch_at=lambda consumed: derived.batch_at(consumed)[0],
        )

    wanted = valid_source is not None and valid_samples > 0
    return Corpus(
        train=loader(train_source),
        valid=loader(valid_source) if wanted and valid_source is not None else None,
        source_names=tuple(train_source.names),
        valid_samples=valid_samples,
    )
