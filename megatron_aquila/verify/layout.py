"""One way to run: what parity varies, and which ways there are."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from megatron_aquila.config.derive import known_replicas, micro_batches_of, num_chunks
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.plan.stages import FIXED_CHUNKS

NOT_BY_STAGE: Mapping[str, Any] = {  # what is recomputed in stages that are not there
    f"recompute_{field}_per_stage": () for field in ("granularity", "method", "layers")
}
LARGEST_MICRO_BATCH = 2  # two samples at once show what more would
OFFLOADED = 0.9  # of the optimizer: all but a bucket or two, so that both sides update
OFFLOADED_LAYERS = 2  # of each stage: where it has more, also some that stay
BUCKET_MIB = {False: 1.0, True: 1 / 64}  # the whole small model in two buckets, or one for every few weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One way to run the model. The default is the simplest: one process, nothing deferred, overlapped or computed
    again. ``small_buckets``: so small that the small model has several. ``offload``: part of the optimizer is on the
    host. ``offload_activations``: so are the activations of some layers. ``uneven``: as ``uneven_sizes``.
    """

    tp: int = 1
    sequence: bool = False
    pp: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    dp: int = 1
    cp: int = 1
    cp_method: str = "ring"
    zero: int = 1
    zero_group: int | None = None
    micro_batch: int = 1
    uneven: bool = False
    recompute: str = "none"
    overlap: bool = False
    small_buckets: bool = False
    deterministic: bool = False
    fused: bool = False
    offload: bool = False
    offload_activations: bool = False

    @property
    def world_size(self) -> int:
        """Processes it needs."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def options(self) -> dict[str, Any]:
        """What differs from the simplest."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }

    def without(self, *options: str) -> "Layout":
        """This layout with ``options``, and what has no meaning without them, as in the simplest."""
        gone = {*options, *(name for name, other in NEEDS if other in options)}
        left = Layout(**{name: value for name, value in self.options.items() if name not in gone})
        return left if left.schedule == self.schedule else replace(left, chunks=FIXED_CHUNKS.get(left.schedule, 1))

    def __str__(self) -> str:
        return " ".join(WORDS[name].format(value) for name, value in self.options.items()) or "one process"


WORDS: Mapping[str, str] = {
    "tp": "tp {}",
    "sequence": "sp",
    "pp": "pp {}",
    "schedule": "{}",
    "chunks": "chunks {}",
    "dp": "dp {}",
    "cp": "cp {}",
    "cp_method": "{}",
    "zero": "ZeRO-{}",
    "zero_group": "in groups of {}",
    "micro_batch": "mbs {}",
    "uneven": "uneven",
    "recompute": "recompute {}",
    "overlap": "overlap",
    "small_buckets": "small buckets",
    "deterministic": "deterministic",
    "fused": "fused",
    "offload": "offload",
    "offload_activations": "activations offloaded",
}
NEEDS = (  # without the second the first is nothing
    ("sequence", "tp"),
    ("zero", "dp"),
    ("zero_group", "dp"),
    ("uneven", "dp"),
    ("uneven", "micro_batch"),
    ("small_buckets", "dp"),
    ("deterministic", "dp"),
    ("cp_method", "cp"),
)


def is_supported(layout: Layout) -> bool:
    """Whether a run can be set so; a schedule may exist for one number of chunks only, and groups must be several."""
    plain, replicas = Layout(), layout.dp * layout.cp
    if layout.zero_group is not None and (layout.zero_group == replicas or replicas % layout.zero_group):
        return False
    return layout.chunks == FIXED_CHUNKS.get(layout.schedule, layout.chunks) and not any(
        getattr(layout, name) != getattr(plain, name) and getattr(layout, other) == getattr(plain, other)
        for name, other in NEEDS
    )


def uneven_sizes(layout: Layout) -> tuple[int, ...]:
    """Of two neighbouring replicas the first computes a sample more at once, and the second one fewer.

    So a round is as long as with equal ones, and the same global batch serves both.
    """
    sizes = [layout.micro_batch + 1 - 2 * (replica % 2) for replica in range(layout.dp)]
    return (*sizes[: layout.dp - layout.dp % 2], *[layout.micro_batch] * (layout.dp % 2))


def requested_layout(config: RunConfig) -> Layout:
    """What the settings ask for. Buckets are small wherever they matter, as the model will be."""
    parallel, dp = config.parallel, known_replicas(config)
    micro_batches = micro_batches_of(config.train, dp)
    uneven = len(set(micro_batches)) > 1
    return Layout(
        tp=parallel.tensor,
        sequence=parallel.sequence and parallel.tensor > 1,
        pp=parallel.pipeline,
        schedule=parallel.schedule,
        chunks=num_chunks(parallel),
        dp=dp,
        cp=parallel.context,
        cp_method=parallel.context_method if parallel.context > 1 else "ring",
        zero=parallel.zero if dp > 1 else 1,
        zero_group=parallel.zero_group if dp > 1 and parallel.zero_group != dp * parallel.context else None,
        micro_batch=LARGEST_MICRO_BATCH if uneven else min(*micro_batches, LARGEST_MICRO_BATCH),
        uneven=uneven,
        recompute=config.train.recompute,
        overlap=parallel.overlap and parallel.tensor * parallel.context * parallel.pipeline * dp > 1,
        small_buckets=dp > 1,
        deterministic=parallel.deterministic_reduce and dp > 1,
        fused=parallel.fuse_main_grads,
        offload=config.optim.offload_optimizer > 0,
        offload_activations=config.train.offload_activations > 0,
    )


def with_layout(config: RunConfig, layout: Layout) -> RunConfig:
    """The small settings run as ``layout`` says.

    Stages that were placed by hand are, where there are as many; else they are balanced.
    """
    parallel = config.parallel
    by_hand = parallel.stage_layers is not None and len(parallel.stage_layers) == layout.pp * layout.chunks
    schedule: Any = layout.schedule
    recompute: Any = layout.recompute
    method: Any = layout.cp_method
    by_stage = {} if layout.pp * layout.chunks == parallel.pipeline * num_chunks(parallel) else NOT_BY_STAGE
    return replace(
        config,
        parallel=replace(
            parallel,
            tensor=layout.tp,
            sequence=layout.sequence,
            pipeline=layout.pp,
            schedule=schedule,
            chunks=layout.chunks,
            stage_layers=parallel.stage_layers if by_hand and layout.pp * layout.chunks > 1 else None,
            data=layout.dp,
            context=layout.cp,
            context_method=method,
            zero=layout.zero,
            zero_group=layout.zero_group,
            overlap=layout.overlap,
            bucket_mib=BUCKET_MIB[layout.small_buckets],
            grad_reduce="fp32",  # rounding to bf16 on the way is not what float64 can prove
            deterministic_reduce=layout.deterministic,
            fuse_main_grads=layout.fused,
        ),
        optim=replace(config.optim, offload_optimizer=OFFLOADED if layout.offload else 0.0),
        train=replace(
            config.train,
            micro_batch=layout.micro_batch,
            micro_batch_per_dp=uneven_sizes(layout) if layout.uneven else (),
            recompute=recompute,
            offload_activations=OFFLOADED_LAYERS if layout.offload_activations else 0,
            **by_stage,
        ),
    )
