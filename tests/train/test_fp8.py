"""A machine whose linears multiply in 8 bits, compared with wider ones and with itself on other layouts."""

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_aquila.kernels import fp8
from megatron_aquila.kernels.products import Fp8Products, NativeProducts
from megatron_aquila.parallel.layers import ColumnParallelLinear
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.parallel.vocab_loss import VocabParallelOutput
from megatron_aquila.verify.observe import assemble, build_small
from megatron_aquila.verify.pool import WorkerPool
from tests.parallel.worlds import CPU, distance, on_ranks, tp_group
from tests.train.test_overlap import first_gradients

Pools = Callable[[int], WorkerPool]
CONFIG = RunConfig(
    model=ModelConfig(
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        ffn_size=96,
        vocab_size=61,
        vocab_multiple=8,
        seq_len=32,
        init_std=0.1,
    ),
    parallel=ParallelConfig(data=1),
    train=TrainConfig(precision="fp8", device="cpu", global_batch=4, train_samples=4),
)


def gradients(pool: Pools, precision: str = "fp8", *, recompute: str = "none", **parallel: object) -> dict[str, Tensor]:
    layout = ParallelConfig(data=1, **parallel)  # type: ignore[arg-type]
    train = replace(CONFIG.train, precision=precision, recompute=recompute)
    config = replace(CONFIG, parallel=layout, train=train)
    ranks: list[list[Chunk]] = pool(layout.tensor * layout.pipeline).run(first_gradients, config)
    return assemble(chunk for chunks in ranks for chunk in chunks)


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return distance(
        *(torch.cat([grads[name].double().flatten() for name in sorted(expected)]) for grads in (found, expected))
    )


def test_gradients_are_near_those_of_wider_products(pool: Pools) -> None:
    exact, bf16, ours = (gradients(pool, precision) for precision in ("fp64", "bf16", "fp8"))
    # A gradient passes some ten products forward and ten backward, whose two operands are off by up to 2**-4 (3 bits)
    # or 2**-3 (2 bits) at random, on average less than half of it: sqrt(10 * (2 * 2**-5**2 + 2**-5**2 + 2**-4**2)).
    assert apart(ours, exact) < 0.27
    assert apart(ours, exact) > 2 * apart(bf16, exact), "nothing was rounded to 8 bits"


@pytest.mark.parametrize(
    "layout",
    [{"tensor": 2, "sequence": True}, {"tensor": 2, "fuse_main_grads": False}],
    ids=str,
)
def test_a_split_over_ranks_changes_less_than_8_bits_do(pool: Pools, layout: dict[str, object]) -> None:
    exact, whole, parts = gradients(pool, "fp64"), gradients(pool), gradients(pool, **layout)
    # Partial sums are rounded to bf16 once more. A last bit tips one rounding to 8 bits in some 20, by a whole step of
    # theirs, while all others are off by a third of a step: sqrt(1 / 20) against 1 / sqrt(12).
    assert apart(parts, whole) < apart(whole, exact)


@pytest.mark.parametrize("layout", [{"pipeline": 2}, {"pipeline": 2, "schedule": "zb-h1"}], ids=str)
def test_a_pipeline_changes_no_bit(pool: Pools, layout: dict[str, object]) -> None:
    assert apart(gradients(pool, **layout), gradients(pool)) == 0


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(pool: Pools, recompute: str) -> None:
    assert apart(gradients(pool, recompute=recompute), gradients(pool)) == 0


def column_output(size: int) -> Tensor:
    """y of this rank's columns."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in ((16, 2, 64), (96, 64)))
    weight += weight.sign()  # none so small that it falls below the smallest normal number
    weight[:48] *= 10  # the ranks' scales differ
    group = tp_group(size)
    placement = Placement(tp=group, sequence_parallel=False, dtype=torch.bfloat16, device=CPU, products=Fp8Products())
    linear = ColumnParallelLinear(64, 96, placement=placement)
    with torch.no_grad():
        linear.weight.copy_(weight.chunk(size)[group.rank])
        result: Tensor = linear(x)
    return result


def test_columns_split_over_ranks_are_the_same_bits(pool: Pools) -> None:
    [whole], halves = on_ranks(pool, 1, column_output), on_ranks(pool, 2, column_output)
    assert torch.equal(torch.cat(halves, dim=-1), whole)


def head_products() -> tuple[bool, int]:
    stages = build_small(CONFIG).stages.values()
    heads = [module for stage in stages for module in stage.modules() if isinstance(module, VocabParallelOutput)]
    return isinstance(heads[0].placement.products, NativeProducts), len(heads)


def test_logits_stay_in_16_bits(pool: Pools) -> None:
    assert pool(1).run(head_products) == [(True, 1)]


def wrong_scale() -> list[Chunk]:
    """What comes from the loss is scaled up and never down again."""
    right = fp8.quantized

    def wrong(x: Tensor, dtype: torch.dtype) -> fp8.Quantized:
        result = right(x, dtype)
        return replace(result, scale=torch.ones_like(result.scale)) if dtype is torch.float8_e5m2 else result

    with patch.object(fp8, "quantized", wrong):
        return first_gradients(CONFIG)


def test_a_wrong_scale_shows(pool: Pools) -> None:
    wrong = assemble(chunk for chunks in pool(1).run(wrong_scale) for chunk in chunks)
    assert apart(wrong, gradients(pool, "fp64")) > 1
