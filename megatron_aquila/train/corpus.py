"""The run's data: sample indices of the blend, and loaders over them."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

from megatron_aquila.checkpoint.agree import agreed, together
from megatron_aquila.config.derive import Derived
from megatron_aquila.config.schema import DataConfig, RunConfig
from megatron_aquila.data.blend import build_datasets, build_datasets_per_split, describe_data, parse_blend
from megatron_aquila.data.documents import DocumentRules
from megatron_aquila.data.loader import BatchLoader, SegmentedSource
from megatron_aquila.data.manifest import check_fingerprint, read_fingerprint
from megatron_aquila.data.progress import Report, ignore, lines
from megatron_aquila.data.samples import SampleSource
from megatron_aquila.data.tokenizer import Tokenizer, fingerprint, load_tokenizer
from megatron_aquila.data.verify import check_largest_token
from megatron_aquila.errors import ConfigError, Problem
from megatron_aquila.parallel.batch import Batch
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.train.build import host_batch
from megatron_aquila.train.launcher import Launch

ALL_TO_TRAIN: Final = "1"  # the split where validation has data of its own


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What the run reads, as kept in checkpoints: a run that continues must read the same.

    ``sets`` describes each data set without its place on disk, ``tokenizer`` is the fingerprint of the named
    files, or what the data says of itself; ``None`` where neither is there. ``documents`` holds the fields of
    ``DocumentRules`` where documents are kept apart.
    """

    sets: list[dict[str, Any]]
    seq_len: int
    tokenizer: str | None
    documents: dict[str, Any] | None = None

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """What is not as a checkpoint's ``asdict(identity)`` says, in words. A run may name no tokenizer."""
        found = []
        if saved["seq_len"] != self.seq_len:
            found.append(f"--seq-len {saved['seq_len']} there, {self.seq_len} here")
        if None not in (saved["tokenizer"], self.tokenizer) and saved["tokenizer"] != self.tokenizer:
            found.append("another tokenizer")
        documents = saved.get("documents")  # checkpoints of before there were rules have none
        if documents != self.documents:
            there, here = ("none" if rules is None else rules for rules in (documents, self.documents))
            found.append(f"rules for documents: {there} there, {here} here")
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
    """Loaders of this rank, of batches on the host.

    ``valid`` is ``None`` where the split has no validation documents or none is wanted.
    """

    train: BatchLoader[Batch]
    valid: BatchLoader[Batch] | None
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
    prefixes = parse_blend(data.path)[0] + (parse_blend(data.valid_path)[0] if data.valid_path else [])
    tokenizer, eod = read_fingerprint(prefixes), data.eod_token_id
    if (found := named_tokenizer(data)) is not None:
        if found.vocab_size != config.model.vocab_size:
            why = f"the tokenizer has {found.vocab_size} tokens"
            way_out = f"use --vocab-size {found.vocab_size}"
            raise ConfigError([Problem("--vocab-size", config.model.vocab_size, why, way_out)])
        tokenizer = fingerprint(found)
        check_fingerprint(prefixes, tokenizer)
        eod = end_of_document(data, found)
    check_largest_token(prefixes, config.model.vocab_size)
    rules = document_rules(data, eod)
    return Identity(
        sets=describe_data(data.path, ALL_TO_TRAIN if data.valid_path else data.split),
        seq_len=config.model.seq_len,
        tokenizer=tokenizer,
        documents=None if rules is None else asdict(rules),
    )


def named_tokenizer(data: DataConfig) -> Tokenizer | None:
    """The tokenizer of the files that the settings name, if any."""
    files = (data.vocab_file, data.merge_file, data.special_tokens_file, data.tokenizer_model)
    if all(path is None for path in files):
        return None
    return load_tokenizer(
        data.tokenizer_type,
        vocab_file=data.vocab_file,
        merge_file=data.merge_file,
        special_tokens_file=data.special_tokens_file,
        tokenizer_model=data.tokenizer_model,
    )


def end_of_document(data: DataConfig, tokenizer: Tokenizer) -> int | None:
    """The token that ends a document. Raises ``ConfigError`` where setting and tokenizer differ."""
    given, own = data.eod_token_id, tokenizer.eod
    if given is not None and own is not None and given != own:
        raise ConfigError([Problem("--eod-token-id", given, f"the tokenizer's is {own}", "leave it out")])
    return own if given is None else given


def document_rules(data: DataConfig, eod: int | None) -> DocumentRules | None:
    """What the settings keep apart at the token ``eod``, if anything. Raises ``ConfigError`` where there is none."""
    if not (data.reset_position_ids or data.reset_attention_mask or data.eod_mask_loss):
        return None
    if eod is None:
        why = "the tokenizer names no token that ends a document"
        raise ConfigError([Problem("--eod-token-id", "", why, "give the id that ends the documents in the data")])
    return DocumentRules(
        eod=eod,
        reset_positions=data.reset_position_ids,
        reset_attention=data.reset_attention_mask,
        mask_loss=data.eod_mask_loss,
    )


def shared_rules(identity: Identity | None, ctx: ParallelContext) -> DocumentRules | None:
    """Rank 0's rules for documents, on every rank: the others have not read the tokenizer. Collective."""
    (fields, *_) = together(lambda: None if identity is None else identity.documents, ctx.world)
    return None if fields is None else DocumentRules(**fields)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """The samples of a run; ``valid`` is ``None`` where there are none or none are wanted."""

    train: SegmentedSource
    valid: SampleSource | None


def valid_samples(config: RunConfig) -> int:
    """Samples of one validation: the first ``eval_iters`` global batches, so that its losses can be compared."""
    return config.train.eval_iters * config.train.global_batch if config.train.eval_interval > 0 else 0


def build_sources(config: RunConfig, *, segments: tuple[int, ...], build: bool, report: Report = ignore) -> Sources:
    """Open the run's sample indices; with ``build`` make what is missing, else wait for another process. Local.

    ``segments`` are the index lengths of ``TrainState.index_segments``; segment k is shuffled with seed + k.
    """
    wanted = valid_samples(config)
    splits = []
    for index, length in enumerate(segments):
        settings: dict[str, Any] = {
            "sizes": (length, wanted if index == 0 else 0, 0),
            "seq_len": config.model.seq_len,
            "seed": config.seed + index,
            "cache_path": config.data.cache_path,
            "build": build,
            "report": report,
        }
        if config.data.valid_path:
            splits.append(build_datasets_per_split((config.data.path, config.data.valid_path, ()), **settings))
        else:
            splits.append(build_datasets(config.data.path, split=config.data.split, **settings))
    trains = [(split.train, length) for split, length in zip(splits, segments, strict=True) if split.train is not None]
    return Sources(train=SegmentedSource(trains), valid=splits[0].valid if wanted > 0 else None)


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

    ``segments`` as in ``build_sources``; ``identity`` is rank 0's, which has read the tokenizer.
    """
    documents = shared_rules(identity, ctx)

    def build(build_missing: bool) -> Sources:
        return build_sources(config, segments=segments, build=build_missing, report=lines(print))

    # Rank 0 first: where its folder is every node's, the others find the index there.
    agreed(lambda: build(build_missing=True) if ctx.rank == 0 else None, ctx.world)
    agreed(lambda: build(build_missing=True) if launch.local_rank == 0 else None, ctx.world)
    sources = agreed(lambda: build(build_missing=False), ctx.world)

    def loader(source: SampleSource, batch_at: Callable[[int], int]) -> BatchLoader[Batch]:
        return BatchLoader(
            source,
            dp_rank=ctx.dp.rank,
            dp_size=ctx.dp.size,
            micro_batch=config.train.micro_batch,
            vocab_size=derived.shape.vocab_size,
            prepare=partial(host_batch, pinned=ctx.device.type == "cuda"),
            prefetch=config.data.prefetch,
            batch_at=batch_at,
            documents=documents,
        )

    return Corpus(
        train=loader(sources.train, derived.batches.global_batch_at),
        valid=None if sources.valid is None else loader(sources.valid, lambda _: config.train.global_batch),
        source_names=sources.train.names,
        valid_samples=valid_samples(config),
        identity=identity,
    )
