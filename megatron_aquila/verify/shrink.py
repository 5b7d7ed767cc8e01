"""The user's own settings, made small: same structure and switches, a model that float64 on a laptop can prove."""

import math
from dataclasses import replace

from megatron_aquila.config.derive import given_layers, num_chunks
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.verify.layout import Layout

HEAD_DIM = 8
SEQ_LEN = 16
VOCAB_SIZE = 61  # prime, so that the last vocabulary shard is uneven at every tp > 1
EOD = 7  # ends documents, where the settings keep them apart
LOSS_CHUNK = 5  # tokens; a microbatch has several chunks, and the last one has fewer
SCORE_CLAMP = 0.25  # some scores are beyond it
MAX_Z_LOSS = 0.05
MICROBATCHES = 2  # a rank's, where replicas and micro-batch size are as asked for; elsewhere more


def shrink(config: RunConfig, largest: Layout) -> RunConfig:
    """``config`` with few, narrow layers and short samples, in float64, with a size that every layout divides.

    Kept: the ratio of query to key/value heads, norm and rope constants, the pattern of uneven stages, clipping and the
    optimizer's constants. ``largest`` is the layout with every axis at its requested degree.
    """
    model, kv_heads = config.model, config.model.num_kv_heads
    group = max(1, model.num_heads // (model.num_heads if kv_heads is None else kv_heads))
    # two a rank: with one, a query head could not read the wrong one; 6, 12 or 24 heads have slopes of both kinds, and
    # 6 are as few as a matrix's Ulysses can split in two
    kv_of_rank = 6 if model.position_embedding == "alibi" else 2
    small_kv = kv_of_rank * largest.tp
    if largest.cp_method == "ulysses":
        group *= largest.cp // math.gcd(largest.cp, kv_of_rank * group)  # a tensor rank's query heads split over cp
    num_heads = small_kv * group
    stage_layers = small_stages(given_layers(config.parallel))
    stages = largest.pp * largest.chunks
    samples = max(MICROBATCHES * largest.dp * largest.micro_batch, 2 * largest.pp)
    samples += -samples % (largest.dp * largest.micro_batch)
    return replace(
        config,
        model=replace(
            model,
            num_layers=sum(stage_layers) if stage_layers is not None else stages + 1,
            hidden_size=4 * HEAD_DIM,
            num_heads=num_heads,
            num_kv_heads=small_kv,
            head_dim=HEAD_DIM,
            ffn_size=6 * HEAD_DIM,
            vocab_size=VOCAB_SIZE,
            vocab_multiple=8,
            seq_len=SEQ_LEN,
            rope_trained_len=None,  # what the factor leaves
            init_std=0.2,  # a residual stream of order one: small weights would hide errors
            score_clamp=None if model.score_clamp is None else SCORE_CLAMP,
            max_z_loss=MAX_Z_LOSS if model.max_z_loss > 0 else 0.0,
        ),
        parallel=replace(
            config.parallel, stage_layers=stage_layers, pipeline_layout=None, chunks=num_chunks(config.parallel)
        ),
        data=replace(config.data, eod_token_id=EOD),
        optim=replace(config.optim, lr_warmup_samples=0, moments_dtype="fp32", master_weights="fp32"),
        train=replace(
            config.train,
            precision="fp64",
            device="cpu",
            global_batch=samples,
            micro_batch=largest.micro_batch,
            micro_batch_per_dp=(),
            train_samples=samples,
            rampup_batch=None,
            loss_chunk_tokens=0 if config.train.loss_chunk_tokens == 0 else LOSS_CHUNK,
        ),
    )


def small_stages(stage_layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """An uneven split made small: 1 layer where the fewest are, 2 elsewhere, none where there are none."""
    if stage_layers is None:
        return None
    fewest = min(layers for layers in stage_layers if layers > 0)
    return tuple((layers > 0) + (layers > fewest) for layers in stage_layers)
