"""Stages as modules: parameter table, initial weights, memory of nothing on meta; parity itself is in tests/verify."""

from dataclasses import replace

import pytest
import torch

from megatron_aquila.kernels.dispatch import choose_kernels
from megatron_aquila.kernels.documents import Documents
from megatron_aquila.model.aquila import AquilaStage, build_stages
from megatron_aquila.model.init import initialize_
from megatron_aquila.parallel.batch import Batch
from megatron_aquila.parallel.context import Group, ParallelContext
from megatron_aquila.parallel.params import ParamInfo
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.plan.flops import num_params
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.plan.stages import plan_stages
from megatron_aquila.verify.reference import plain_losses, plain_weights
from megatron_aquila.verify.sample import sample_batch

SHAPE = ModelShape(
    num_layers=3,
    hidden_size=32,
    ffn_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=61,
    padded_vocab_size=64,
    seq_len=16,
    init_std=0.2,
)
AQUILA2_34B = ModelShape(
    num_layers=60,
    hidden_size=6144,
    ffn_size=24576,
    num_heads=48,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=100008,
    padded_vocab_size=100096,
    seq_len=4096,
)


def paper_context(grid: RankGrid, rank: int, device: torch.device) -> ParallelContext:
    """A rank of any world without a process group: enough to build, not to communicate."""
    at = grid.coords(rank)

    def group(name: str, *axes: str) -> Group:
        size = grid.size(*axes)  # type: ignore[arg-type]
        ranks = next(ranks for ranks in grid.groups(*axes) if rank in ranks)  # type: ignore[arg-type]
        return Group(name, ranks.index(rank), size, ranks, None)

    assert at["cp"] == 0
    return ParallelContext(
        grid=grid,
        rank=rank,
        device=device,
        tp=group("tp", "tp"),
        cp=group("cp", "cp"),
        dp=group("dp", "dp"),
        pp=group("pp", "pp"),
        pp_links={},
        dp_cp=group("dp_cp", "dp", "cp"),
        shards=group("shards", "dp", "cp"),
        copies=group("copies"),
        world=group("world", "tp", "cp", "dp", "pp"),
        host_world=group("world", "tp", "cp", "dp", "pp"),
    )


def stages_of(shape: ModelShape, ctx: ParallelContext, dtype: torch.dtype = torch.float64) -> dict[int, AquilaStage]:
    plan = plan_stages(shape, ctx.pp.size)
    kernels = choose_kernels(torch.device("cpu"), dtype)
    return build_stages(shape, plan, pp_rank=ctx.pp.rank, placement=placed(ctx, dtype), kernels=kernels)


def placed(ctx: ParallelContext, dtype: torch.dtype, *, sequence_parallel: bool = False) -> Placement:
    return Placement(tp=ctx.tp, sequence_parallel=sequence_parallel, dtype=dtype, device=ctx.device)


def infos_of(shape: ModelShape, ctx: ParallelContext) -> list[ParamInfo]:
    return [info for stage in stages_of(shape, ctx).values() for info in stage.param_infos()]


def loss_of(stage: AquilaStage, batch: Batch) -> torch.Tensor:
    out: torch.Tensor = stage(None, batch)
    return out.t()


def test_one_stage_is_the_plain_model() -> None:
    (stage,) = stages_of(SHAPE, ParallelContext.single()).values()
    initialize_(stage.param_infos(), seed=3)
    batch = sample_batch(SHAPE, range(3), seed=5)
    plain = plain_losses(plain_weights(SHAPE, seed=3), SHAPE, batch.tokens_BS, batch.labels_BS, batch.positions_BS)
    found = loss_of(stage, batch)
    assert float((found - plain).detach().norm() / plain.norm()) < 1e-13
    shifted = replace(batch, positions_BS=batch.positions_BS * 2)
    assert float((loss_of(stage, shifted) - plain).detach().norm() / plain.norm()) > 1e-6


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_nothing_leaks_from_one_document_into_the_next(attention: str) -> None:
    """The gradient of the second document's loss with respect to the first one's embeddings is 0 to the last bit."""
    kernels = choose_kernels(torch.device("cpu"), torch.float64, forced={"attention": attention})
    (stage,) = build_stages(
        SHAPE,
        plan_stages(SHAPE, 1),
        pp_rank=0,
        placement=placed(ParallelContext.single(), torch.float64),
        kernels=kernels,
    ).values()
    initialize_(stage.param_infos(), seed=3)
    embedding, border = stage.embedding, 6
    assert embedding is not None
    batch = sample_batch(SHAPE, range(2), seed=5)
    bounds = (0, border, 16, 32)

    def leaked(documents: Documents | None) -> torch.Tensor:
        embedded: list[torch.Tensor] = []
        hook = embedding.register_forward_hook(lambda _module, _inputs, x_SBH: embedded.append(x_SBH))
        loss_BS = loss_of(stage, replace(batch, documents=documents))
        hook.remove()
        (grad_SBH,) = torch.autograd.grad(loss_BS[0, border:].sum(), embedded)
        assert grad_SBH[border:, 0].abs().amax(dim=-1).gt(0).all(), "its own embeddings count"
        assert not grad_SBH[:, 1].any(), "samples never meet"
        return grad_SBH[:border, 0]

    assert not leaked(Documents(bounds, torch.tensor(bounds, dtype=torch.int32))).any()
    assert leaked(None).abs().amax(dim=-1).gt(0).all()


def test_logits_are_what_the_loss_is_of() -> None:
    (stage,) = stages_of(SHAPE, ParallelContext.single()).values()
    initialize_(stage.param_infos(), seed=3)
    batch = sample_batch(SHAPE, range(2), seed=5)
    logits = stage.logits(None, batch.tokens_BS, batch.positions_BS)[..., : SHAPE.vocab_size]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels_BS.t().flatten(), reduction="none"
    ).view(SHAPE.seq_len, 2)
    assert torch.allclose(expected.t(), loss_of(stage, batch), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_initial_weights_do_not_depend_on_the_layout(tp: int, pp: int) -> None:
    grid = RankGrid(tp=tp, pp=pp)
    expected = plain_weights(SHAPE, seed=3)
    seen = {name: torch.full_like(weight, torch.nan) for name, weight in expected.items()}
    for rank in range(grid.world_size):
        infos = infos_of(SHAPE, paper_context(grid, rank, torch.device("cpu")))
        initialize_(infos, seed=3)
        for info in infos:
            for part in info.parts:
                rows = info.param.detach()[part.local_row : part.local_row + part.shape[0]]
                place = tuple(slice(start, start + size) for start, size in zip(part.offset, part.shape, strict=True))
                seen[part.name][place] = rows
    assert all(torch.equal(seen[name], weight) for name, weight in expected.items())
    other = plain_weights(SHAPE, seed=4)
    assert not torch.equal(other["lm_head.weight"], expected["lm_head.weight"])


def test_padded_rows_are_zero_and_in_no_part() -> None:
    infos = infos_of(SHAPE, ParallelContext.single())
    initialize_(infos, seed=3)
    head = next(info for info in infos if info.name == "lm_head.weight")
    assert head.param.shape[0] == 64
    assert sum(part.shape[0] for part in head.parts) == 61
    assert not head.param[61:].any()


def test_norms_alone_do_not_decay_and_sum_over_tp_only_under_sequence_parallel() -> None:
    ctx = ParallelContext.single()
    kernels = choose_kernels(torch.device("cpu"), torch.float64)
    for sequence_parallel in (False, True):
        stages = build_stages(
            SHAPE,
            plan_stages(SHAPE, 1),
            pp_rank=0,
            placement=placed(ctx, torch.float64, sequence_parallel=sequence_parallel),
            kernels=kernels,
        )
        for info in stages[0].param_infos():
            is_norm = info.name.endswith("norm.weight")
            assert info.weight_decay is not is_norm
            assert info.sums_over_tp is (is_norm and sequence_parallel)


def test_the_34b_at_512_ranks_is_whole_on_meta() -> None:
    """Every element of the 34B is in exactly one part of one (tp, pp) position; nothing is allocated."""
    grid = RankGrid(tp=4, pp=4, dp=32)
    elements = 0
    for rank in [grid.rank(tp=tp, pp=pp) for tp in range(4) for pp in range(4)]:
        ctx = paper_context(grid, rank, torch.device("meta"))
        for stage in stages_of(AQUILA2_34B, ctx, torch.bfloat16).values():
            for info in stage.param_infos():
                assert info.param.is_meta
                elements += sum(torch.Size(part.shape).numel() for part in info.parts if part.replica == 0)
    assert elements == num_params(AQUILA2_34B) == 33_693_554_688
