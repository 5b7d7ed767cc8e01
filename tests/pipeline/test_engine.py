"""The engine over gloo against one process, what it keeps, and what it leaves."""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from megatron_aquila.parallel.batch import Batch
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.layers import ColumnParallelLinear
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.pipeline.action import Action, Op, Schedule
from megatron_aquila.pipeline.checks import needed_link_depth
from megatron_aquila.pipeline.engine import Engine
from megatron_aquila.pipeline.schedules import build_schedule, forward_only
from megatron_aquila.pipeline.simulate import simulate
from megatron_aquila.pipeline.wire import LocalWire, P2PWire
from megatron_aquila.plan.grid import RankGrid
from megatron_aquila.plan.stages import stage_ranks
from megatron_aquila.verify.pool import WorkerPool

SCHEDULES = "gpipe", "1f1b", "zb-h1"  # one stage a rank
KINDS = [("gpipe", 1), ("gpipe", 2), ("1f1b", 1), ("1f1b", 2), ("1f1b", 3), ("zb-h1", 1), ("zb-v", 2)]  # name, chunks
B, S, H, V, LAYERS = 2, 5, 8, 11, 14


class ToyStage(nn.Module):
    """Some layers of a toy model; the weights of a layer do not depend on the stage that holds it."""

    def __init__(self, layers: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()

        def draw(seed: int, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))

        self.embedding = draw(99, V, H) if 0 in layers else None
        self.layers = nn.ParameterDict({f"{i:02}": draw(i, H, H) for i in layers})  # sorts its keys

    def forward(self, x_SBH: Tensor | None, batch: Batch) -> Tensor:
        if self.embedding is not None:
            x_SBH = self.embedding[batch.tokens_BS.T]
        assert x_SBH is not None
        for weight in self.layers.values():
            x_SBH = x_SBH + torch.tanh(x_SBH) @ weight
        return x_SBH

    def grads(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.named_parameters() if p.grad is not None}


def toy_stages(num_stages: int, dtype: torch.dtype = torch.float32) -> list[ToyStage]:
    """The layers over the stages, unevenly: the first takes what does not divide."""
    each = LAYERS // num_stages
    first = LAYERS - each * (num_stages - 1)
    cuts = [0, *(first + each * s for s in range(num_stages))]
    return [ToyStage(range(cuts[s], cuts[s + 1]), dtype) for s in range(num_stages)]


def toy_batches(count: int) -> list[Batch]:
    rng = torch.Generator().manual_seed(7)
    tokens = torch.randint(V, (count, 2, B, S), generator=rng)
    masks = torch.randint(2, (count, B, S), generator=rng).float()
    positions = torch.arange(S).expand(B, S)
    return [
        Batch(
            tokens_BS=tokens[m, 0],
            labels_BS=tokens[m, 1],
            loss_mask_BS=masks[m],
            positions_BS=positions,
            source_B=torch.zeros(B, dtype=torch.int64),
        )
        for m in range(count)
    ]


def toy_loss(y_SBH: Tensor, batch: Batch) -> Tensor:
    picked_SB = y_SBH.gather(-1, (batch.labels_BS.T % H).unsqueeze(-1)).squeeze(-1)
    return (picked_SB.square() * batch.loss_mask_BS.T).sum() / 17.0


def world_of_one(count: int, name: str = "1f1b", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    (stage,) = toy_stages(1, dtype)
    engine = Engine({0: stage}, num_stages=1, loss_fn=toy_loss, wire=LocalWire())
    engine.step(build_schedule(name, 1, count)[0], toy_batches(count))
    return stage.grads()


def connect(
    pp: int, stage_rank: Sequence[int], dtype: torch.dtype, depth: int = 1, *, overlap: bool = True
) -> tuple[ParallelContext, P2PWire]:
    ctx = ParallelContext.create(RankGrid(pp=pp), torch.device("cpu"), pp_turns_back=len(stage_rank) > pp)
    shape = (S, B, H)
    return ctx, P2PWire(ctx, stage_rank=stage_rank, activation_shape=shape, dtype=dtype, depth=depth, overlap=overlap)


def train_rank(
    name: str, pp: int, chunks: int, count: int, dtype: torch.dtype, overlap: bool = True
) -> dict[str, Tensor]:
    stage_rank, schedule = stage_ranks(name, pp, chunks), build_schedule(name, pp, count, chunks)
    ctx, wire = connect(pp, stage_rank, dtype, needed_link_depth(schedule, len(stage_rank)), overlap=overlap)
    made = enumerate(toy_stages(len(stage_rank), dtype))
    stages = {number: stage for number, stage in made if stage_rank[number] == ctx.pp.rank}
    engine = Engine(stages, num_stages=len(stage_rank), loss_fn=toy_loss, wire=wire)
    engine.step(schedule[ctx.pp.rank], toy_batches(count))
    assert not any(wire._sending.values())
    return {name: grad for stage in stages.values() for name, grad in stage.grads().items()}


@pytest.mark.parametrize(("name", "chunks"), KINDS)
@pytest.mark.parametrize(("pp", "count"), [(1, 3), (2, 1), (2, 5), (4, 1), (4, 2), (4, 4), (4, 7), (4, 11)])
def test_gradients_bit_equal_one_process(
    pool: Callable[[int], WorkerPool], name: str, chunks: int, pp: int, count: int
) -> None:
    """Also with fewer microbatches than ranks, uneven stages, and counts that do not divide."""
    expected, got = world_of_one(count), {}
    for grads in pool(pp).run(train_rank, name, pp, chunks, count, torch.float32, count != 5):
        got |= grads
    assert got.keys() == expected.keys()
    for key, grad in expected.items():
        assert torch.equal(got[key], grad), key


def test_world_of_one_equals_plain_autograd() -> None:
    """The second reference: no engine at all. Same sums in the same order."""
    (stage,) = toy_stages(1)
    for batch in toy_batches(3):
        toy_loss(stage(None, batch), batch).backward()
    for name in SCHEDULES:
        expected = stage.grads()
        for key, grad in world_of_one(3, name).items():
            assert torch.equal(grad, expected[key]), key


def test_bit_equality_can_fail() -> None:
    """Mutant: the same microbatches, their backwards in the opposite order, are equal to rounding only."""
    (stage,) = toy_stages(1)
    engine = Engine({0: stage}, num_stages=1, loss_fn=toy_loss, wire=LocalWire())
    program = build_schedule("gpipe", 1, 7)[0]
    engine.step([*program[:7], *reversed(program[7:])], toy_batches(7))
    expected = world_of_one(7)
    assert any(not torch.equal(grad, expected[key]) for key, grad in stage.grads().items())
    for key, grad in stage.grads().items():
        torch.testing.assert_close(grad, expected[key])


def test_bf16_travels(pool: Callable[[int], WorkerPool]) -> None:
    expected = world_of_one(3, dtype=torch.bfloat16)
    for grads in pool(2).run(train_rank, "1f1b", 2, 2, 3, torch.bfloat16):
        for key, grad in grads.items():
            assert grad.dtype is torch.bfloat16
            assert torch.equal(grad, expected[key]), key


def one_rank_holds_all(schedule: Schedule, num_stages: int) -> list[Action]:
    """All ranks' work on one rank, in the order of the simulator's clock."""
    timeline = simulate(schedule, lambda action: 1.0)
    return sorted(timeline.start, key=lambda action: (timeline.start[action], action.stage))


@pytest.mark.parametrize("name", SCHEDULES)
def test_all_stages_on_one_rank(name: str) -> None:
    stages = toy_stages(5)
    engine = Engine(dict(enumerate(stages)), num_stages=5, loss_fn=toy_loss, wire=LocalWire())
    engine.step(one_rank_holds_all(build_schedule(name, 5, 3), 5), toy_batches(3))
    got = {k: grad for stage in stages for k, grad in stage.grads().items()}
    for key, grad in world_of_one(3).items():
        assert torch.equal(got[key], grad), key


class Void:
    """A wire to nowhere: gives constants, keeps nothing."""

    def send(self, op: Op, stage: int, microbatch: int, x: Tensor) -> None:
        pass

    def expect(self, op: Op, stage: int, microbatch: int) -> None:
        pass

    def recv(self, op: Op, stage: int, microbatch: int) -> Tensor:
        return torch.ones(S, B, H)

    def flush(self) -> None:
        pass


class CountedStage(nn.Module):
    """A parallel linear, which may leave its weight gradient for later, on an input whose storage is counted."""

    def __init__(self, placement: Placement, alive: list[int]) -> None:
        super().__init__()
        self.alive = alive
        self.linear = ColumnParallelLinear(H, H, placement=placement)
        nn.init.normal_(self.linear.weight)

    def forward(self, x_SBH: Tensor | None, batch: Batch) -> Tensor:
        x_SBH = torch.ones(S, B, H) if x_SBH is None else torch.tanh(x_SBH)
        self.alive[0] += 1
        weakref.finalize(x_SBH.untyped_storage(), self.count_down)
        return self.linear(x_SBH)  # type: ignore[no-any-return]

    def count_down(self) -> None:
        self.alive[0] -= 1


def most_kept(name: str, chunks: int, ranks: int, count: int) -> list[int]:
    """For each rank, the most inputs of linears that lived at once: saved by autograd, or owed to a W."""
    tp = ParallelContext.create(RankGrid(), torch.device("cpu")).tp
    schedule = build_schedule(name, ranks, count, chunks)
    most = []
    for program in schedule.values():
        alive, seen = [0], [0]
        placement = Placement(tp=tp, sequence_parallel=False, dtype=torch.float32, device=torch.device("cpu"))
        stages = {stage: CountedStage(placement, alive) for stage in {action.stage for action in program}}
        outputs: list[weakref.ref[Tensor]] = []

        def run(
            x: Tensor | None, batch: Batch, *, stage: int, stages=stages, alive=alive, seen=seen, outputs=outputs
        ) -> Tensor:
            assert not any(ref() is not None for ref in outputs), "an output outlived its sending"
            y = stages[stage](x, batch)
            seen[0] = max(seen[0], alive[0])
            if stage < ranks * chunks - 1:
                outputs.append(weakref.ref(y))
            return y

        engine = Engine(
            {stage: partial(run, stage=stage) for stage in stages},
            num_stages=ranks * chunks,
            loss_fn=lambda y, batch: y.sum(),
            wire=Void(),
            weight_grads=placement.weight_grads,
        )
        engine.step(program, toy_batches(count))
        assert alive[0] == 0, f"{alive[0]} inputs outlived the step"
        most.append(seen[0])
    return most


@pytest.mark.parametrize(("name", "chunks"), KINDS)
@pytest.mark.parametrize(("ranks", "count"), [(1, 3), (4, 7), (4, 2), (4, 11)])
def test_keeps_what_the_schedule_promises(
    pool: Callable[[int], WorkerPool], name: str, chunks: int, ranks: int, count: int
) -> None:
    """Measured, for each rank: activations of whole backwards, and those that wait for a W."""
    timeline = simulate(build_schedule(name, ranks, count, chunks), lambda action: 1.0)
    (most,) = pool(1).run(most_kept, name, chunks, ranks, count)
    assert most == [timeline.peak_in_flight(rank) for rank in range(ranks)]


def test_what_is_left_over_is_named() -> None:
    (stage,) = toy_stages(1)
    engine = Engine({0: stage}, num_stages=1, loss_fn=toy_loss, wire=LocalWire())
    with pytest.raises(AssertionError, match=r"activations left over: \['0F1'\]"):
        engine.step(build_schedule("gpipe", 1, 2)[0][:-1], toy_batches(2))


def test_a_stage_must_use_its_input() -> None:
    weight = nn.Parameter(torch.ones(S, B, H))
    engine = Engine({1: lambda x, batch: weight * 2}, num_stages=3, loss_fn=toy_loss, wire=Void())
    with pytest.raises(AssertionError, match="stage 1 did not use its input"):
        engine.step(build_schedule("1f1b", 3, 1)[1], toy_batches(1))


def most_sent_alive(name: str, pp: int, count: int) -> dict[Op, int]:
    """Most sent tensors of each kind that lived at once, after any send, in a step or, as ``forward_only``, without."""
    ctx, wire = connect(pp, range(pp), torch.float32)
    stage = toy_stages(pp)[ctx.pp.rank]
    sent: dict[Op, list[weakref.ref[Tensor]]] = {Op.F: [], Op.B: []}
    most = dict.fromkeys(Op, 0)

    def counted(op: Op, to_stage: int, microbatch: int, x: Tensor) -> None:
        P2PWire.send(wire, op, to_stage, microbatch, x)
        sent[op].append(weakref.ref(x))
        del x
        most[op] = max(most[op], sum(ref() is not None for ref in sent[op]))

    with mock.patch.object(wire, "send", counted):
        engine = Engine({ctx.pp.rank: stage}, num_stages=pp, loss_fn=toy_loss, wire=wire)
        if name == "forward_only":
            engine.evaluate(forward_only(range(pp), count)[ctx.pp.rank], toy_batches(count))
        else:
            engine.step(build_schedule(name, pp, count)[ctx.pp.rank], toy_batches(count))
    assert not any(ref() is not None for refs in sent.values() for ref in refs), "something sent outlived the step"
    return most


@pytest.mark.parametrize("name", [*SCHEDULES, "forward_only"])
def test_what_was_sent_is_let_go(pool: Callable[[int], WorkerPool], name: str) -> None:
    """However many microbatches a step has: the tensor on its way, and the one that the caller still holds."""
    for most in pool(4).run(most_sent_alive, name, 4, 12):
        assert max(most.values()) <= 2


def evaluate_rank(pp: int, count: int) -> list[float]:
    ctx, wire = connect(pp, range(pp), torch.float32)
    stage = toy_stages(pp)[ctx.pp.rank]
    seen: list[float] = []

    def observed(y: Tensor, batch: Batch) -> Tensor:
        assert not y.requires_grad
        seen.append(toy_loss(y, batch).item())
        return y

    engine = Engine({ctx.pp.rank: stage}, num_stages=pp, loss_fn=observed, wire=wire)
    engine.evaluate(forward_only(range(pp), count)[ctx.pp.rank], toy_batches(count))
    assert not stage.grads()
    return seen


def test_evaluate_shows_every_loss_to_the_last_stage(pool: Callable[[int], WorkerPool]) -> None:
    (stage,) = toy_stages(1)
    first, last = pool(2).run(evaluate_rank, 2, 3)
    assert first == []
    assert last == [toy_loss(stage(None, batch), batch).item() for batch in toy_batches(3)]


def test_evaluate_takes_no_backward() -> None:
    (stage,) = toy_stages(1)
    engine = Engine({0: stage}, num_stages=1, loss_fn=toy_loss, wire=LocalWire())
    with pytest.raises(AssertionError, match="0B0 in a program for evaluation"):
        engine.evaluate(build_schedule("1f1b", 1, 1)[0], toy_batches(1))


class LinearStage(nn.Module):
    """A parallel linear, whose weight gradient can be owed, and a bias, whose gradient cannot."""

    def __init__(self) -> None:
        super().__init__()
        device = torch.device("cpu")
        tp = ParallelContext.create(RankGrid(), device).tp
        placement = Placement(tp=tp, sequence_parallel=False, dtype=torch.float32, device=device)
        self.linear = ColumnParallelLinear(H, H, placement=placement)
        self.bias = nn.Parameter(torch.zeros(H))
        nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(3))

    def forward(self, x_SBH: Tensor | None, batch: Batch) -> Tensor:
        x_SBH = nn.functional.one_hot(batch.tokens_BS.T % H, H).float()
        return torch.tanh(self.linear(x_SBH) + self.bias)


def linear_grads(program: list[str]) -> dict[str, Tensor | None]:
    stage = LinearStage()
    weight_grads = stage.linear.placement.weight_grads
    engine = Engine({0: stage}, num_stages=1, loss_fn=toy_loss, wire=LocalWire(), weight_grads=weight_grads)
    engine.step([Action(Op(word[0]), 0, int(word[1])) for word in program], toy_batches(2))
    return {name: param.grad for name, param in stage.named_parameters()}


def deferred_against_whole() -> tuple[bool, str]:
    """Whether I and W give the bits of B, and what the engine says of a W left out. In a worker: layers need groups."""
    whole = linear_grads(["F0", "B0", "F1", "B1"])
    late = linear_grads(["F0", "I0", "F1", "I1", "W0", "W1"])
    message = ""
    try:
        linear_grads(["F0", "I0", "F1", "I1", "W0"])
    except AssertionError as error:
        message = str(error)
    return all(torch.equal(whole[name], late[name]) for name in whole), message


def test_late_weight_gradients_are_bit_equal_and_never_forgotten(pool: Callable[[int], WorkerPool]) -> None:
    assert pool(1).run(deferred_against_whole) == [(True, "weight gradients left over: [(0, 1)]")]
