"""The ZeRO-1 optimizer against torch.optim on one process, and the norm against the whole model's."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_aquila.kernels.remainder import join, split
from megatron_aquila.optim import buckets, clip, distributed
from megatron_aquila.optim.buckets import Storage
from megatron_aquila.optim.distributed import DistributedOptimizer
from megatron_aquila.optim.rules import AdamW, Rule, Sgd
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.params import Constant, FlatRange, ParamInfo, Part
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.verify.pool import WorkerPool
from tests.optim.toys import SHAPES, draw, give_gradients, toy_infos

STEPS, MICROBATCHES = 4, 4  # microbatches of a step over all replicas
WEIGHT_DECAY = 0.1
RULES: dict[str, Rule] = {
    "adamw": AdamW(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=WEIGHT_DECAY),
    "sgd": Sgd(weight_decay=WEIGHT_DECAY),
}
ONE_BUCKET, MANY_BUCKETS = 10**6, 1000
UNUSED = ("bias",)  # backward never reaches it


def lr_of(step: int) -> float:
    return 0.01 * (step + 1)


def make(
    dp: int = 1, *, rule: str = "adamw", dtype: torch.dtype = torch.float64, bucket_bytes: int = ONE_BUCKET
) -> tuple[list[ParamInfo], DistributedOptimizer, ParallelContext]:
    ctx = ParallelContext.create(RankGrid(dp=dp), torch.device("cpu"))
    infos = toy_infos(dtype)
    return infos, DistributedOptimizer(infos, ctx, rule=RULES[rule], bucket_bytes=bucket_bytes), ctx


def train(
    dp: int, rule: str, dtype: torch.dtype, bucket_bytes: int, max_norm: float
) -> tuple[dict[str, Tensor], list[float]]:
    """Parameters after some steps on this rank's share of the microbatches, and the norms."""
    infos, optimizer, ctx = make(dp, rule=rule, dtype=dtype, bucket_bytes=bucket_bytes)
    norms = []
    for step in range(STEPS):
        optimizer.begin_step(MICROBATCHES // dp)
        for microbatch in range(ctx.rank, MICROBATCHES, dp):
            give_gradients(infos, step, microbatch, skip=UNUSED)
        optimizer.reduce_gradients()
        how = optimizer.clip(max_norm)
        optimizer.step(lr_of(step), how)
        norms.append(how.norm.item())
    assert optimizer.applied_steps == STEPS
    return {info.name: info.param.detach().clone() for info in infos}, norms


def plain(rule: str, max_norm: float, *, divide_by: int = 1) -> tuple[dict[str, Tensor], list[float]]:
    """The same with torch alone, in float64."""
    params = {info.name: nn.Parameter(info.param.detach().clone()) for info in toy_infos(torch.float64)}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params.values() if p.dim() == 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8) if rule == "adamw" else torch.optim.SGD(groups)
    norms = []
    for step in range(STEPS):
        for i, (name, param) in enumerate(params.items()):
            total = torch.zeros_like(param)
            if name not in UNUSED:
                total += sum(draw(param.shape, i, step, m) for m in range(MICROBATCHES))
            param.grad = total / divide_by
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in params.values() if p.grad is not None]).item())
        if max_norm > 0:
            torch.nn.utils.clip_grad_norm_(params.values(), max_norm)
        for group in theirs.param_groups:
            group["lr"] = lr_of(step)
        theirs.step()
    return {name: param.detach() for name, param in params.items()}, norms


def error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of a tensor, as a share of its norm."""
    return max(((got[name] - value).norm() / value.norm()).item() for name, value in expected.items())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_equals_torch_optim(pool: Callable[[int], WorkerPool], dp: int, rule: str, max_norm: float) -> None:
    expected, norms = plain(rule, max_norm)
    for got, got_norms in pool(dp).run(train, dp, rule, torch.float64, MANY_BUCKETS, max_norm):
        assert error(got, expected) <= 1e-12
        assert got_norms == pytest.approx(norms, rel=1e-12)


def test_a_mean_over_replicas_would_show(pool: Callable[[int], WorkerPool]) -> None:
    """Mutant: with sums divided by dp, the norms and (under SGD) the parameters are far off."""
    mean, norms = plain("sgd", 0.0, divide_by=2)
    for got, got_norms in pool(2).run(train, 2, "sgd", torch.float64, MANY_BUCKETS, 0.0):
        assert error(got, mean) > 1e-3
        assert got_norms == pytest.approx([2 * norm for norm in norms], rel=1e-12)


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_bucket_sizes_change_no_bit(pool: Callable[[int], WorkerPool], dp: int, dtype: torch.dtype) -> None:
    """Unclipped, up to two replicas: a sum of two has one order, and the update works element by element."""
    one = pool(dp).run(train, dp, "adamw", dtype, ONE_BUCKET, 0.0)
    many = pool(dp).run(train, dp, "adamw", dtype, MANY_BUCKETS, 0.0)
    for (got, _), (expected, _) in zip(one, many, strict=True):
        assert all(torch.equal(got[name], expected[name]) for name in SHAPES)


def test_bucket_sizes_of_more_replicas_change_only_the_order_of_sums(pool: Callable[[int], WorkerPool]) -> None:
    one = pool(4).run(train, 4, "adamw", torch.float64, ONE_BUCKET, 1.0)
    many = pool(4).run(train, 4, "adamw", torch.float64, MANY_BUCKETS, 1.0)
    for (got, _), (expected, _) in zip(one, many, strict=True):
        assert error(got, expected) <= 1e-14


@pytest.mark.parametrize("dp", [1, 2])
def test_bf16_weights_are_rounded_float32_masters(pool: Callable[[int], WorkerPool], dp: int) -> None:
    """fp32 AdamW on masters that began as the bf16 weights, fed with fp32 sums of bf16 gradients, cast at the end."""
    params = {info.name: nn.Parameter(info.param.detach().float()) for info in toy_infos(torch.bfloat16)}
    theirs = torch.optim.AdamW(
        [{"params": [p], "weight_decay": WEIGHT_DECAY if p.dim() == 2 else 0.0} for p in params.values()],
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
    )
    for step in range(STEPS):
        for i, (name, param) in enumerate(params.items()):
            shares = [torch.zeros_like(param) for _ in range(dp)]
            for m in range(0 if name in UNUSED else MICROBATCHES):
                shares[m % dp] += draw(param.shape, i, step, m).bfloat16()
            param.grad = sum(shares, torch.zeros_like(param))
        for group in theirs.param_groups:
            group["lr"] = lr_of(step)
        theirs.step()
    for got, _ in pool(dp).run(train, dp, "adamw", torch.bfloat16, ONE_BUCKET, 0.0):
        for name, param in params.items():
            assert torch.equal(got[name], param.bfloat16()), name
    without_masters = nn.Parameter(params["matrix"].detach().bfloat16())
    assert not torch.equal(without_masters + 1e-4, without_masters.float() + 1e-4), "bf16 loses small updates"


NARROW = Storage(moments=torch.bfloat16, has_remainders=True)
STORAGES = {"whole": Storage(), "remainders": Storage(has_remainders=True), "narrow": NARROW}


def stored(dp: int, storage: str, bucket_bytes: int) -> list[tuple[str, str, int, Tensor]]:
    """Kind, parameter, place and values of what a rank keeps after some steps whose gradients are given."""
    ctx = ParallelContext.create(RankGrid(dp=dp), torch.device("cpu"))
    infos = toy_infos(torch.bfloat16)
    rule, how = RULES["adamw"], STORAGES[storage]
    optimizer = DistributedOptimizer(infos, ctx, rule=rule, bucket_bytes=bucket_bytes, storage=how)
    for step in range(STEPS):
        optimizer.begin_step(1)
        if ctx.rank == 0:  # the sum over replicas has no order then
            give_gradients(infos, step)
        optimizer.reduce_gradients()
        optimizer.step(lr_of(step), optimizer.clip(0.0))
    return [(kind, flat.info.name, flat.start, view.clone()) for kind, flat, view in optimizer.ranges()]


def assembled(ranks: list[list[tuple[str, str, int, Tensor]]]) -> dict[str, dict[str, Tensor]]:
    whole: dict[str, dict[str, Tensor]] = {}
    for kind, name, start, view in (share for shares in ranks for share in shares):
        size = torch.Size(SHAPES[name]).numel()
        target = whole.setdefault(kind, {}).setdefault(name, torch.zeros(size, dtype=view.dtype))
        target[start : start + view.numel()] = view
    return whole


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


def test_a_weight_that_is_not_its_master_rounded_is_named() -> None:
    infos, optimizer, _ = make(dtype=torch.bfloat16)
    optimizer.refresh_masters()
    assert optimizer.not_masters() == []
    infos[1].param.data.view(torch.int16).view(-1)[3] ^= 1
    assert optimizer.not_masters() == [infos[1].name]
    optimizer.refresh_masters()
    assert optimizer.not_masters() == []


def test_remainders_keep_the_masters_bits_and_shards_change_none(pool: Callable[[int], WorkerPool]) -> None:
    (alone,) = pool(1).run(stored, 1, "whole", ONE_BUCKET)
    whole = assembled([alone])
    halves = {name: split(master) for name, master in whole["master"].items()}
    for dp, size in ((1, ONE_BUCKET), (2, MANY_BUCKETS), (4, ONE_BUCKET)):
        found = assembled(pool(dp).run(stored, dp, "remainders", size))
        assert found.keys() == {"grad", "weight", "remainder", "exp_avg", "exp_avg_sq"}
        masters = {name: join(found["weight"][name], found["remainder"][name]) for name in SHAPES}
        assert equal(masters, whole["master"])
        assert equal(found["weight"], {name: weight for name, (weight, _) in halves.items()})
        assert all(equal(found[moment], whole[moment]) for moment in ("exp_avg", "exp_avg_sq"))


def test_narrow_states_depend_on_no_shard(pool: Callable[[int], WorkerPool]) -> None:
    outcomes = [
        assembled(pool(dp).run(stored, dp, "narrow", size)) for dp, size in ((1, ONE_BUCKET), (2, MANY_BUCKETS))
    ]
    for kind in ("weight", "remainder", "exp_avg", "exp_avg_sq"):
        assert equal(outcomes[0][kind], outcomes[1][kind])
    assert {x.dtype for kind in ("exp_avg", "exp_avg_sq") for x in outcomes[0][kind].values()} == {torch.bfloat16}


def test_sgd_has_no_remainders() -> None:
    infos, ctx = toy_infos(torch.bfloat16), ParallelContext.single()
    optimizer = DistributedOptimizer(infos, ctx, rule=RULES["sgd"], bucket_bytes=ONE_BUCKET, storage=NARROW)
    with pytest.raises(AssertionError, match="SGD keeps masters in float32"):
        optimizer.step(0.1, optimizer.clip(0.0))


def test_only_bf16_weights_have_remainders() -> None:
    for dtype, kinds in ((torch.float32, {"weight"}), (torch.float16, {"weight", "master"})):
        infos, ctx = toy_infos(dtype), ParallelContext.single()
        optimizer = DistributedOptimizer(infos, ctx, rule=RULES["sgd"], bucket_bytes=ONE_BUCKET, storage=NARROW)
        assert {kind for kind, _, _ in optimizer.ranges()} == {"grad", *kinds}


def test_refreshed_remainders_are_of_the_weights() -> None:
    infos, ctx = toy_infos(torch.bfloat16), ParallelContext.single()
    optimizer = DistributedOptimizer(infos, ctx, rule=RULES["adamw"], bucket_bytes=ONE_BUCKET, storage=NARROW)
    for kind, _, view in optimizer.ranges():
        if kind == "remainder":
            view.fill_(5)
    optimizer.refresh_masters()
    assert not any(view.any() for kind, _, view in optimizer.ranges() if kind == "remainder")


def share(dp: int) -> list[tuple[str, str, int, int, Tensor, bool]]:
    """This rank's ranges after a step, and whether each weight range shares memory with its parameter."""
    infos, optimizer, ctx = make(dp, dtype=torch.bfloat16, bucket_bytes=MANY_BUCKETS)
    give_gradients(infos, 0, ctx.rank)
    optimizer.reduce_gradients()
    optimizer.step(0.01, optimizer.clip(0.0))
    return [
        (kind, flat.info.name, flat.start, flat.stop, view.clone(), is_own(kind, flat, view))
        for kind, flat, view in optimizer.ranges()
    ]


def is_own(kind: str, flat: FlatRange, view: Tensor) -> bool:
    own = flat.info.param.detach().flatten()[flat.start : flat.stop]
    return kind != "weight" or (own.data_ptr() == view.data_ptr() and torch.equal(own, view))


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_ranges_cover_every_element_once(pool: Callable[[int], WorkerPool], dp: int) -> None:
    counts: dict[tuple[str, str], Tensor] = {}
    for ranges in pool(dp).run(share, dp):
        for kind, name, start, stop, view, own in ranges:
            assert view.shape == (stop - start,)
            assert view.dtype is (torch.bfloat16 if kind == "weight" else torch.float32)
            assert own
            count = counts.setdefault((kind, name), torch.zeros(torch.Size(SHAPES[name]).numel()))
            count[start:stop] += 1
    assert counts.keys() == {(k, n) for k in ("grad", "weight", "master", "exp_avg", "exp_avg_sq") for n in SHAPES}
    assert all(bool((count == 1).all()) for count in counts.values())


def test_ranges_have_masters_only_where_kept() -> None:
    for rule, kinds in (("adamw", {"grad", "weight", "exp_avg", "exp_avg_sq"}), ("sgd", {"grad", "weight"})):
        _, optimizer, _ = make(rule=rule, dtype=torch.float32)
        assert {kind for kind, _, _ in optimizer.ranges()} == kinds


def test_state_restored_through_ranges_continues_bit_equal() -> None:
    """What a checkpoint does: fill the views of a fresh optimizer, set its count, go on."""
    infos, optimizer, _ = make(dtype=torch.bfloat16, bucket_bytes=MANY_BUCKETS)
    give_gradients(infos, 1)
    optimizer.reduce_gradients()
    optimizer.step(0.01, optimizer.clip(0.0))
    fresh_infos, fresh, _ = make(dtype=torch.bfloat16, bucket_bytes=MANY_BUCKETS)
    for (_, _, target), (_, _, source) in zip(fresh.ranges(), optimizer.ranges(), strict=True):
        target.copy_(source)
    fresh.applied_steps = optimizer.applied_steps
    for those, it in ((infos, optimizer), (fresh_infos, fresh)):
        it.begin_step(1)
        give_gradients(those, 2)
        it.reduce_gradients()
        it.step(0.01, it.clip(0.0))
    for ours, theirs in zip(infos, fresh_infos, strict=True):
        assert torch.equal(ours.param, theirs.param)


def test_refresh_masters_takes_weights_loaded_from_outside() -> None:
    infos, optimizer, _ = make(rule="sgd", dtype=torch.bfloat16)
    with torch.no_grad():
        for info in infos:
            info.param.fill_(3.0)
    stale = [view.clone() for kind, _, view in optimizer.ranges() if kind == "master"]
    assert not any((view == 3.0).any() for view in stale), "without a refresh the next step would undo the load"
    optimizer.refresh_masters()
    optimizer.step(0.0, optimizer.clip(0.0))
    assert all(bool((info.param == 3.0).all()) for info in infos)


def test_begin_step_forgets() -> None:
    infos, optimizer, _ = make()
    give_gradients(infos, 1)
    optimizer.begin_step(1)
    optimizer.reduce_gradients()
    assert optimizer.clip(1.0).norm == 0.0


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_that_are_not_finite_change_nothing(dtype: torch.dtype, rule: str, bad: float) -> None:
    infos, optimizer, _ = make(rule=rule, dtype=dtype)
    gradients_of_step(optimizer, infos, 1)
    optimizer.step(0.1, optimizer.clip(1.0))
    before = [view.clone() for kind, _, view in optimizer.ranges() if kind != "grad"]
    gradients_of_step(optimizer, infos, 2)
    infos[0].param.backward(torch.full_like(infos[0].param, bad))
    optimizer.reduce_gradients()
    how = optimizer.clip(1.0)
    assert how.norm == bad or how.norm.isnan()
    optimizer.step(0.1, how)
    assert optimizer.applied_steps == 1
    assert all(map(torch.equal, [view for kind, _, view in optimizer.ranges() if kind != "grad"], before))
    gradients_of_step(optimizer, infos, 3)
    optimizer.step(0.1, optimizer.clip(1.0))
    assert optimizer.applied_steps == 2
    assert not any(map(torch.equal, [view for kind, _, view in optimizer.ranges() if kind == "weight"], before))


def gradients_of_step(optimizer: DistributedOptimizer, infos: list[ParamInfo], seed: int) -> None:
    optimizer.begin_step(1)
    give_gradients(infos, seed)
    optimizer.reduce_gradients()


def test_clipping_leaves_gradients_as_they_are() -> None:
    infos, optimizer, _ = make()
    grads = give_gradients(infos, 1)
    optimizer.reduce_gradients()
    how = optimizer.clip(1e-3, loss_scale=4.0)
    optimizer.step(0.1, how)
    (norm_grad,) = [view for kind, flat, view in optimizer.ranges() if kind == "grad" and flat.info.name == "norm"]
    assert torch.equal(norm_grad, grads["norm"])
    assert how.factor < 1e-3


class NoWait(TorchDispatchMode):
    """On ``meta`` there is no value to wait for; what would ask for one raises."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
        assert devices <= {"meta"}, f"{func} copies between host and device"
        return out


@pytest.mark.parametrize("rule", RULES)
def test_a_step_waits_for_nothing(rule: str) -> None:
    ctx = replace(ParallelContext.single(), device=torch.device("meta"))
    infos = [replace(info, param=nn.Parameter(info.param.to("meta"))) for info in toy_infos(torch.bfloat16)]
    optimizer = DistributedOptimizer(infos, ctx, rule=RULES[rule], bucket_bytes=MANY_BUCKETS)
    with NoWait():
        gradients = [torch.empty_like(info.param) for info in infos]
        optimizer.begin_step(1)
        torch.autograd.backward([info.param for info in infos], gradients)
        optimizer.reduce_gradients()
        optimizer.step(0.1, optimizer.clip(1.0, loss_scale=2.0))
        optimizer.wait_for_weights(info.param for info in infos)
        with pytest.raises(AssertionError, match="the host waits"):
            assert optimizer.applied_steps


def test_collectives_of_a_step_can_be_counted() -> None:
    calls: list[str] = []

    def counted(module: Any, name: str) -> Any:
        real = getattr(module, name)
        return patch.object(
            module, name, side_effect=lambda *args, **options: (calls.append(name), real(*args, **options))[1]
        )

    infos = [replace(info, sums_over_tp=not info.weight_decay) for info in toy_infos(torch.float64)]
    optimizer = DistributedOptimizer(infos, ParallelContext.single(), rule=RULES["adamw"], bucket_bytes=MANY_BUCKETS)
    num_buckets = len(optimizer._buckets)
    assert num_buckets > 2
    with (
        counted(buckets, "begin_reduce_scatter_flat_"),
        counted(buckets, "begin_all_gather_flat_"),
        counted(distributed, "all_reduce_"),
    ):
        give_gradients(infos, 1)
        optimizer.reduce_gradients()
        optimizer.step(0.1, optimizer.clip(1.0))
    reduce = ["all_reduce_"] + ["begin_reduce_scatter_flat_"] * num_buckets  # two partial sums over tp, one all-reduce
    assert calls == [*reduce, "all_reduce_"] + ["begin_all_gather_flat_"] * num_buckets


# The norm of a model that is split over tp and pp, with everything that can be counted wrongly.

GLOBAL = {"column": (8, 6), "row": (6, 8), "norm": (6,), "kv": (2, 6), "vocab": (10, 6)}
PADDED_ROWS = 12  # 6 a rank: the second holds 4 real rows and 2 of padding


def part_of(name: str, pp_rank: int, offset: tuple[int, ...], shape: tuple[int, ...], replica: int = 0) -> Part:
    return Part(name=f"{pp_rank}.{name}", global_shape=GLOBAL[name], offset=offset, shape=shape, replica=replica)


def split_infos(ctx: ParallelContext, *, sums_over_tp: bool = True) -> list[ParamInfo]:
    """One stage's parameters on a tensor-parallel rank of two."""
    t, s = ctx.tp.rank, ctx.pp.rank
    rows = min(6, 10 - 6 * t)
    shapes = {"column": (4, 6), "row": (6, 4), "norm": (6,), "kv": (2, 6), "vocab": (6, 6)}
    parts = {
        "column": part_of("column", s, (4 * t, 0), (4, 6)),
        "row": part_of("row", s, (0, 4 * t), (6, 4)),
        "norm": part_of("norm", s, (0,), (6,), replica=t),
        "kv": part_of("kv", s, (0, 0), (2, 6), replica=t),
        "vocab": part_of("vocab", s, (6 * t, 0), (rows, 6)),
    }
    return [
        ParamInfo(
            param=nn.Parameter(torch.zeros(shape, dtype=torch.float64)),
            stage=s,
            weight_decay=len(shape) == 2,
            init=Constant(0.0),
            parts=(parts[name],),
            sums_over_tp=sums_over_tp and name == "norm",
        )
        for name, shape in shapes.items()
    ]


def logical_gradients(s: int, replica: int) -> dict[str, Tensor]:
    """What one replica contributes to each logical tensor of stage ``s``."""
    return {name: draw(shape, i, s, replica) for i, (name, shape) in enumerate(GLOBAL.items())}


def local_gradient(name: str, whole: Tensor, t: int) -> Tensor:
    """Rank ``t``'s share: a slice, or for the norm weight a partial sum; the padded rows hold rubbish."""
    if name == "vocab":
        padded = torch.full((PADDED_ROWS, 6), 1e6, dtype=torch.float64)
        padded[:10] = whole
        return padded[6 * t : 6 * t + 6]
    return {
        "column": lambda: whole[4 * t : 4 * t + 4],
        "row": lambda: whole[:, 4 * t : 4 * t + 4],
        "norm": lambda: whole * (0.25, 0.75)[t],
        "kv": lambda: whole,
    }[name]()


def every_element(flat: FlatRange) -> Iterator[tuple[int, int]]:
    """Mutant of ``counted``: replicas and padding too."""
    yield flat.start, flat.stop


def no_replica(flat: FlatRange) -> Iterator[tuple[int, int]]:
    """Mutant of ``counted``: replicated parameters on no rank at all."""
    if flat.info.parts[0].shape != flat.info.parts[0].global_shape:
        yield flat.start, flat.stop


def split_norm(grid: RankGrid, mutant: str | None) -> tuple[float, Tensor]:
    """The norm, and the reduced gradient of the stage's norm weight as far as this rank owns it."""
    ctx = ParallelContext.create(grid, torch.device("cpu"))
    infos = split_infos(ctx, sums_over_tp=mutant != "no all-reduce over tp")
    counting = {"every element": every_element, "no replica": no_replica}.get(mutant or "", clip.counted)
    with patch.object(clip, "counted", counting):
        optimizer = DistributedOptimizer(infos, ctx, rule=Sgd(), bucket_bytes=300)
    whole = logical_gradients(ctx.pp.rank, ctx.dp_cp.rank)
    torch.autograd.backward(
        [info.param for info in infos], [local_gradient(name, whole[name], ctx.tp.rank) for name in GLOBAL]
    )
    optimizer.reduce_gradients()
    norm = optimizer.clip(0.0).norm.item()
    owned = [v for kind, flat, v in optimizer.ranges() if kind == "grad" and flat.info.parts[0].name.endswith("norm")]
    return norm, torch.cat([torch.empty(0, dtype=torch.float64), *owned])


GRIDS = [RankGrid(tp=2, dp=2), RankGrid(tp=2, pp=2), RankGrid(tp=2, cp=2)]


def expected_norm(grid: RankGrid) -> float:
    replicas = grid.size("dp", "cp")
    total = 0.0
    for s in range(grid.pp):
        for tensors in zip(*(logical_gradients(s, r).values() for r in range(replicas)), strict=True):
            total += float(sum(tensors).square().sum())
    return total**0.5


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_norm_counts_each_logical_parameter_once(pool: Callable[[int], WorkerPool], grid: RankGrid) -> None:
    results = pool(4).run(split_norm, grid, None)
    norms = [norm for norm, _ in results]
    assert norms == pytest.approx([expected_norm(grid)] * 4, rel=1e-13)
    assert len(set(norms)) == 1, "every rank must clip alike"
    for rank, (_, owned) in enumerate(results):
        at = grid.coords(rank)
        if at["dp"] == at["cp"] == 0:  # the first replica's shard holds the whole small tensor
            whole = sum(logical_gradients(at["pp"], r)["norm"] for r in range(grid.size("dp", "cp")))
            torch.testing.assert_close(owned, whole, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("mutant", ["every element", "no replica", "no all-reduce over tp"])
def test_wrong_counts_would_show(pool: Callable[[int], WorkerPool], mutant: str) -> None:
    grid = RankGrid(tp=2, dp=2)
    for norm, _ in pool(4).run(split_norm, grid, mutant):
        assert abs(norm / expected_norm(grid) - 1) > 1e-3
