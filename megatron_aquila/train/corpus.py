"""The run's data: sample indices of the blend, and loaders over them."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from threading import Event
from typing import Any, Final

from megatron_aquila.checkpoint.agree import agreed, together
from megatron_aquila.config.derive import Derived
from megatron_aquila.config.schema import DataConfig, RunConfig
from megatron_aquila.config.sources import epoch_limits, sources, sources_read, split_of, training_blends, valid_sets
from megatron_aquila.data.blend import Share, alone, describe_data, open_library, shares_of
from megatron_aquila.data.course import Phase, build_course, describe_course
from megatron_aquila.data.documents import DocumentRules
from megatron_aquila.data.indexed import IndexedDataset
from megatron_aquila.data.loader import BatchLoader
from megatron_aquila.data.manifest import check_fingerprint, read_fingerprint
from megatron_aquila.data.open_files import allow_open_files
from megatron_aquila.data.progress import Report, ignore, lines
from megatron_aquila.data.samples import SampleSource
from megatron_aquila.data.segments import SegmentedSource
from megatron_aquila.data.tokenizer import Tokenizer, fingerprint, load_tokenizer
from megatron_aquila.data.verify import check_largest_token, verify_all
from megatron_aquila.errors import ConfigError, DataError, Problem
from megatron_aquila.parallel.batch import Batch
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.train.build import context_pieces, host_batch
from megatron_aquila.train.launcher import Launch

HASHING_SECONDS: Final = 20.0  # between two words from rank 0 that it still hashes


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What the run reads, as kept in checkpoints: a run that continues must read the same.

    ``sets`` describes each data set without its place on disk, ``tokenizer`` is the fingerprint of the named
    files, or what the data says of itself; ``None`` where neither is there. ``documents`` holds the fields of
    ``DocumentRules`` where documents are kept apart. ``phases`` are the later blends: ``start``, the sample of the run
    that each is read from, and its ``sets``.
    """

    sets: list[dict[str, Any]]
    seq_len: int
    tokenizer: str | None
    documents: dict[str, Any] | None = None
    phases: list[dict[str, Any]] = field(default_factory=list)

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
        found += _different_sets(saved["sets"], self.sets)
        phases = saved.get("phases", [])  # as old ones have none
        for number in range(1, 1 + max(len(phases), len(self.phases))):
            there, here = (of[number - 1] if number <= len(of) else None for of in (phases, self.phases))
            if there is None or here is None or there["start"] != here["start"]:
                starts = ["nowhere" if of is None else f"sample {of['start']}" for of in (there, here)]
                found.append(f"phase {number} from {starts[0]} there, {starts[1]} here")
            else:
                found += [f"phase {number}, {what}" for what in _different_sets(there["sets"], here["sets"])]
        return found


def _different_sets(saved: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[str]:
    """Where two descriptions of a blend differ, in words."""
    if len(saved) != len(found):
        return [f"{len(saved)} data sets there, {len(found)} here"]
    return [
        f"data set {number}: {name} {there[name]} there, {value} here"
        for number, (there, here) in enumerate(zip(saved, found, strict=True), start=1)
        for name, value in here.items()
        if there[name] != value
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """Samples that are validated on by themselves: the first ``num_samples`` of ``loader``, the same every time.

    ``name`` is what the log calls them; the held-out split has none.
    """

    name: str | None
    loader: BatchLoader[Batch]
    num_samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Loaders of this rank, of batches on the host.

    ``valid`` is empty where there is nothing to validate on, or no validation is wanted.
    """

    train: BatchLoader[Batch]
    valid: tuple[Validation, ...]
    course: str  # what the run reads, in words
    identity: Identity | None  # on rank 0

    @property
    def source_names(self) -> tuple[str, ...]:
        """The data sets that are trained on, as the batches number them."""
        return self.train.source.names

    def close(self) -> None:
        """Stop reading ahead."""
        for loader in (self.train, *(validation.loader for validation in self.valid)):
            loader.close()


def identify(config: RunConfig) -> Identity:
    """What the run reads, from the headers of its data and its tokenizer's files. Local.

    Raises ``ConfigError`` or ``DataError`` where a file is missing or the tokenizer does not fit the model or the data.
    """
    data = config.data
    blends, prefixes = training_blends(data), sources_read(data)
    held_out = (data.valid_path, *valid_sets(data).values()) if valid_samples(config) > 0 else ()
    for prefix in sources(*held_out):
        IndexedDataset(prefix)  # those that are trained on are opened below, to be described
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
        sets=describe_data(blends[0][1], split_of(data)),
        seq_len=config.model.seq_len,
        tokenizer=tokenizer,
        documents=None if rules is None else asdict(rules),
        phases=[{"start": start, "sets": describe_data(path, split_of(data))} for start, path in blends[1:]],
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
    """The samples of a run; ``valid`` is ``None`` where there are none or none are wanted, ``named`` are by name.

    ``course`` says in words how often each data set is read.
    """

    train: SegmentedSource
    valid: SampleSource | None
    named: Mapping[str, SampleSource]
    course: str


def valid_samples(config: RunConfig) -> int:
    """Samples of one validation: the first ``eval_iters`` global batches, so that its losses can be compared."""
    return config.train.eval_iters * config.train.global_batch if config.train.eval_interval > 0 else 0


def first_segments(config: RunConfig, num_samples: int) -> tuple[int, ...]:
    """``TrainState.index_segments`` of a run that begins: its first index goes as far as the first blend does."""
    first = min([num_samples, *(phase.from_samples for phase in config.data.phases)])
    return (first, num_samples - first) if first < num_samples else (num_samples,)


def build_sources(
    config: RunConfig,
    *,
    segments: tuple[int, ...],
    build: bool,
    report: Report = ignore,
    opened: dict[str, IndexedDataset] | None = None,
) -> Sources:
    """Open the run's sample indices; with ``build`` make what is missing, else wait for another process. Local.

    ``segments`` are the index lengths of ``TrainState.index_segments``; ``opened`` are data sets that are open.
    """
    data, wanted = config.data, valid_samples(config)
    phases = [
        Phase(start=start, paths=tuple(alone(path) if data.train_path else path))
        for start, path in training_blends(data)
    ]
    named = valid_sets(data) if wanted > 0 else {}
    num_sets = len(sources(*(phase.paths for phase in phases), data.valid_path, *named.values()))
    allow_open_files(num_sets, num_indices=2 * num_sets + len(phases))
    library = open_library(
        phases[0].paths,
        seq_len=config.model.seq_len,
        seed=config.seed,
        cache_path=data.cache_path,
        build=build,
        report=report,
        opened=opened,
    )
    train, held_out, test = shares_of(split_of(data))
    assert train is not None, f"--split {data.split} leaves nothing to train on"
    if test is not None:
        for prefix in sources(phases[0].paths):
            library.epoch_tokens(prefix, test)  # an empty split is refused, though a run reads none of it
    course = build_course(library, phases, train, segments=segments, limits=epoch_limits(data))
    valid_path = phases[0].paths
    if data.valid_path:
        valid_path, held_out = tuple(alone(data.valid_path)), Share("valid")
    valid = partial(replace, keep_partial=not data.drop_last_partial_validation_sequence)
    return Sources(
        train=course.source,
        valid=None if held_out is None or wanted == 0 else library.blend(valid_path, valid(held_out), wanted),
        named={name: library.blend(prefixes, valid(Share(name)), None) for name, prefixes in named.items()},
        course=describe_course(course, phases),
    )


def hash_data(config: RunConfig, ctx: ParallelContext) -> None:
    """Rank 0 hashes all that the run reads, and says so. Raises on every rank where a byte is not what it was.

    Collective, every ``HASHING_SECONDS``: none of them takes so long that the others take rank 0 for dead.
    """
    given_up = Event()

    def report(what: str, done: int, total: int) -> None:
        if given_up.is_set():
            raise DataError(f"given up after {done:,} of {total:,} bytes")
        say(what, done, total)

    say, prefixes = lines(print), sources_read(config.data)
    with ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(verify_all, prefixes, report) if ctx.rank == 0 else None

        def line() -> str | None:
            return None if hashed is None or not wait([hashed], HASHING_SECONDS).done else hashed.result()

        try:
            while (found := together(line, ctx.world)[0]) is None:
                pass
        finally:
            given_up.set()
    if ctx.rank == 0:
        print(found)


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

    The ranks of a cp group read the same samples, and keep their own tokens of them.

    ``segments`` as in ``build_sources``; ``identity`` is rank 0's, which has read the tokenizer.
    """
    if config.data.verify_data:
        hash_data(config, ctx)
    documents, opened = shared_rules(identity, ctx), dict[str, IndexedDataset]()
    pieces = context_pieces(config.parallel, derived.shape, ctx.cp)

    def build(build_missing: bool) -> Sources:
        return build_sources(config, segments=segments, build=build_missing, report=lines(print), opened=opened)

    # Rank 0 first: where its folder is every node's, the others find the index there.
    agreed(lambda: build(build_missing=True) if ctx.rank == 0 else None, ctx.world)
    agreed(lambda: build(build_missing=True) if launch.local_rank == 0 else None, ctx.world)
    found = agreed(lambda: build(build_missing=False), ctx.world)

    def loader(
        source: SampleSource, batch_at: Callable[[int], int] | None, num_counted: int | None = None
    ) -> BatchLoader[Batch]:
        return BatchLoader(
            source,
            share=derived.batches.share_of(ctx.dp.rank),
            vocab_size=derived.shape.vocab_size,
            prepare=partial(host_batch, pieces=pieces, pinned=ctx.device.type == "cuda"),
            prefetch=config.data.prefetch,
            batch_at=batch_at,
            documents=documents,
            num_counted=num_counted,
        )

    wanted = valid_samples(config)
    validations = []
    if found.valid is not None:
        held_out = loader(found.valid, lambda _: config.train.global_batch)
        validations.append(Validation(name=None, loader=held_out, num_samples=wanted))
    for name, source in found.named.items():
        count = min(len(source), wanted if config.data.valid_samples is None else config.data.valid_samples)
        validations.append(Validation(name=name, loader=loader(source, None, count), num_samples=count))
    return Corpus(
        train=loader(found.train, derived.batches.global_batch_at),
        valid=tuple(validations),
        course=found.course,
        identity=identity,
    )
