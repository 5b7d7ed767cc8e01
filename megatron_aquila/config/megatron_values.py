"""Values of Megatron-LM's flags in our words: what ``megatron_flags`` advises where it can be exact.

Each raises ``ValueError`` or ``IndexError`` where the value is malformed.
"""

import itertools
from collections.abc import Callable, Sequence

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.config.settings import spell

Values = Sequence[str]


def vocab_multiple(values: Values, config: RunConfig) -> str:
    """``--make-vocab-size-divisible-by``: Megatron-LM multiplies it by tp."""
    return f"use --vocab-multiple {int(values[0]) * config.parallel.tensor} ({values[0]} x tp {config.parallel.tensor})"


def in_samples(flag: str) -> Callable[[Values, RunConfig], str]:
    """A length in steps, as ``flag`` in samples."""
    return lambda values, config: f"use {flag} {int(values[0]) * config.train.global_batch} (steps x global batch)"


def warmup_samples(values: Values, config: RunConfig) -> str:
    """``--lr-warmup-fraction``."""
    return f"use --lr-warmup-samples {round(float(values[0]) * config.train.train_samples)} (of --train-samples)"


def bucket_mib(values: Values, config: RunConfig) -> str:
    """``--ddp-bucket-size``, in elements."""
    return f"use --bucket-mib {int(values[0]) * 4 / 2**20:g} ({values[0]} gradients of 4 bytes)"


def step_folder(values: Values, config: RunConfig) -> str:
    """``--ckpt-step``."""
    return f"use --load {config.checkpoint.load or 'FOLDER'}/step_{int(values[0]):07d}"


def stage_layers(values: Values, config: RunConfig) -> str:
    """``1 15 3 15 15 15``, a count of stages before each device type's layers, is ``--stage-layers 15 15 15 15``."""
    rest, layers = iter(int(value) for value in values), list[int]()
    for count in rest:
        layers += itertools.islice(rest, count)
    return f"use --stage-layers {spell(layers)}"


def micro_batch_per_dp(values: Values, config: RunConfig) -> str:
    """``2 3 4 1``, replicas of a device type and their micro-batch, is ``--micro-batch-per-dp 3 3 1 1 1 1``."""
    pairs = zip(values[::2], values[1::2], strict=True)
    return f"use --micro-batch-per-dp {spell([size for count, size in pairs for _ in range(int(count))])}"


def chunks(values: Values, config: RunConfig) -> str:
    """``--num-layers-per-virtual-pipeline-stage``."""
    stages = config.model.num_layers // int(values[0])
    return f"use --chunks {max(1, stages // config.parallel.pipeline)} (layers / {values[0]} / pp)"


def profile_first(values: Values, config: RunConfig) -> str:
    """Megatron-LM's profiler starts once so many steps are done."""
    return f"use --profile-steps {int(values[0]) + 1}-LAST"


def profile_last(values: Values, config: RunConfig) -> str:
    """``--profile-step-end``."""
    return f"use --profile-steps FIRST-{values[0]}"


def zero_group(values: Values, config: RunConfig) -> str:
    """``--num-distributed-optimizer-instances``: Megatron-LM counts the groups."""
    instances, dp = int(values[0]), config.parallel.data
    if instances == 1:
        return "leave it out: one group is the default"
    if dp is None:
        raise ValueError("dp is not known")
    replicas = dp * config.parallel.context
    return f"use --zero-group {replicas // instances} ({replicas} ranks of dp x cp in {instances} groups)"


def zero_level(values: Values, config: RunConfig) -> str:
    """Megatron-LM's names of what is sharded."""
    levels = {"no_shard": 1, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}
    return f"use --zero {levels[values[0]]}" if values[0] in levels else "use --zero 1, 2 or 3"
