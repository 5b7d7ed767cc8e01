"""The user's own settings, made small: same structure and switches, a model that float64 on a laptop can prove."""

from dataclasses import dataclass, replace

from megatron_aquila.config.schema import RunConfig

HEAD_DIM = 8
SEQ_LEN = 16
VOCAB_SIZE = 61  # prime, so that the last vocabulary shard is uneven at every tp > 1
EOD = 7  # ends documents, where the settings keep them apart
MICROBATCHES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One way to split the run: what parity varies."""

    tp: int = 1
    sequence: bool = False
    pp: int = 1
    dp: int = 1
    micro_batch: int = 1

    @property
    def world_size(self) -> int:
        """Processes it needs."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        sequence = " sp" if self.sequence else ""
        return f"tp {self.tp}{sequence} pp {self.pp} dp {self.dp} mbs {self.micro_batch}"


def shrink(config: RunConfig, largest: Layout) -> RunConfig:
    """``config`` with few, narrow layers and short samples, in float64, with a size that every layout divides.

    Kept: the ratio of query to key/value heads, norm and rope constants, the pattern of uneven stages, the schedule,
    clipping and the optimizer's constants. ``largest`` is the layout with every axis at its requested degree.
    """
    model, kv_heads = config.model, config.model.num_kv_heads
    group = model.num_heads // (model.num_heads if kv_heads is None else kv_heads)
    small_kv = 2 * largest.tp  # two a rank: with one, a query head could not read the wrong one
    num_heads = small_kv * max(1, group)
    stage_layers = small_stages(config.parallel.stage_layers)
    samples = MICROBATCHES * largest.dp * largest.micro_batch
    return replace(
        config,
        model=replace(
            model,
            num_layers=sum(stage_layers) if stage_layers is not None else largest.pp + 1,
            hidden_size=4 * HEAD_DIM,
            num_heads=num_heads,
            num_kv_heads=small_kv,
            head_dim=HEAD_DIM,
            ffn_size=6 * HEAD_DIM,
            vocab_size=VOCAB_SIZE,
            vocab_multiple=8,
            seq_len=SEQ_LEN,
            init_std=0.2,  # a residual stream of order one: small weights would hide errors
        ),
        data=replace(config.data, eod_token_id=EOD),
        train=replace(
            config.train,
            precision="fp64",
            device="cpu",
            global_batch=samples,
            micro_batch=largest.micro_batch,
            train_samples=samples,
            rampup_batch=None,
        ),
    )


def small_stages(stage_layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """An uneven split made small: 1 layer where the fewest are, 2 elsewhere."""
    if stage_layers is None:
        return None
    return tuple(1 + (layers > min(stage_layers)) for layers in stage_layers)


def with_layout(config: RunConfig, layout: Layout) -> RunConfig:
    """The small settings split as ``layout`` says.

    Without a pipeline there are no stages to place by hand, and the schedule is the plain one: what a pipeline is held
    against has nothing deferred.
    """
    stage_layers = small_stages(config.parallel.stage_layers) if layout.pp > 1 else None
    return replace(
        config,
        parallel=replace(
            config.parallel,
            tensor=layout.tp,
            pipeline=layout.pp,
            data=layout.dp,
            sequence=layout.sequence,
            stage_layers=stage_layers,
            schedule=config.parallel.schedule if layout.pp > 1 else "1f1b",
            bucket_mib=1,
            grad_reduce="fp32",  # rounding to bf16 on the way is not what float64 can prove
        ),
        train=replace(config.train, micro_batch=layout.micro_batch),
    )
