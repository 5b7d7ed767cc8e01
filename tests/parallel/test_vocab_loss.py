"""The output projection and the loss in chunks, against logits that exist all at once."""

from collections import Counter
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_aquila.kernels.cross_entropy import cross_entropy
from megatron_aquila.parallel import vocab_loss
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.parallel.vocab_loss import VocabParallelOutput
from megatron_aquila.parallel.weight_grads import MainGrad
from tests.parallel.worlds import CPU, CountCollectives, distance, on_ranks, share, tp_group

S, B, H, PADDED = 8, 3, 6, 16
TOLERANCE = 1e-12
VOCABS = [16, 13, 7]  # with tp 4: no padded row; one real row on the last rank; two ranks with nothing but padding
CHUNK = 5  # of 24 tokens: the last chunk is shorter


def tensors(vocab_size: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """x_SBH, the weight with padded rows that would rule the softmax, labels, and the tokens' weights, some 0."""
    generator = torch.Generator().manual_seed(vocab_size)
    x = torch.randn(S, B, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, H, generator=generator, dtype=torch.float64)
    weight[vocab_size:] = 1e3
    labels = torch.randint(vocab_size, (S, B), generator=generator)
    labels[0] = vocab_size - 1  # the last real column, on an uneven shard
    weights = torch.rand(S, B, generator=generator, dtype=torch.float64) * (torch.arange(S)[:, None] > 1)
    return [x.to(dtype), weight.to(dtype), labels, weights.to(torch.promote_types(dtype, torch.float32))]


def output(size: int, sp: bool, vocab_size: int, weight: torch.Tensor, **settings) -> VocabParallelOutput:
    placement = Placement(
        tp=tp_group(size), sequence_parallel=sp, dtype=weight.dtype, device=CPU, overlap=settings.pop("overlap", False)
    )
    made = VocabParallelOutput(H, vocab_size, PADDED, placement=placement, **settings)
    with torch.no_grad():
        made.weight.copy_(share(weight, tp_group(size)))
    return made


def errors(
    size: int,
    sp: bool,
    vocab_size: int,
    chunk: int | None = CHUNK,
    dtype: torch.dtype = torch.float64,
    how: str = "autograd",
) -> list[float]:
    """Distance of loss and both gradients from the plain ones in float64. ``how``: where the weight's gradient goes."""
    group = tp_group(size)
    x, weight, labels, weights = tensors(vocab_size, dtype)
    full = [value.double().clone().requires_grad_() for value in (x, weight)]
    expected = cross_entropy(full[0] @ full[1].T, labels, vocab_size=vocab_size)
    expected_grads = torch.autograd.grad((expected * weights.double()).sum(), full)

    ours = output(size, sp, vocab_size, weight, chunk_tokens=chunk, overlap=how == "owed sum")
    queue, added = ours.placement.weight_grads, []
    total = torch.zeros(ours.weight.shape, dtype=torch.promote_types(dtype, torch.float32))
    if "sum" in how:
        queue.accumulate_into({ours.weight: MainGrad(total, lambda: added.append(1))})
    mine = share(x, group) if sp else x.clone().requires_grad_()
    loss = ours(mine, labels, weights)
    assert loss.dtype is torch.promote_types(dtype, torch.float32)
    with queue.deferring("W") if "owed" in how else nullcontext():
        (loss * weights).sum().backward()
    if "owed" in how:
        assert ours.weight.grad is None
        assert not added
        queue.pay("W")
    assert added == ([1] if "sum" in how else [])
    grad_weight = total if "sum" in how else ours.weight.grad
    assert mine.grad is not None
    real = max(0, min(vocab_size - group.rank * PADDED // size, PADDED // size))
    assert (grad_weight[real:] == 0).all(), "a padded row got a gradient"
    rank_grad = share(expected_grads[1], group).detach()
    return [
        distance(loss, expected),
        distance(mine.grad, expected_grads[0].chunk(size)[group.rank] if sp else expected_grads[0]),
        float((grad_weight - rank_grad).norm() / expected_grads[1].norm()),
    ]


@pytest.mark.parametrize(("size", "sp"), [(1, False), (2, False), (2, True), (4, True)])
@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("chunk", [0, 1, CHUNK, None])
def test_loss_and_gradients_are_the_plain_ones(pool, size: int, sp: bool, vocab_size: int, chunk: int | None) -> None:
    for found in on_ranks(pool, size, errors, sp, vocab_size, chunk):
        assert max(found) <= TOLERANCE


@pytest.mark.parametrize("how", ["autograd", "owed", "sum", "owed sum"])
@pytest.mark.parametrize("sp", [False, True])
def test_the_weights_gradient_goes_where_a_linears_does(pool, how: str, sp: bool) -> None:
    for found in on_ranks(pool, 2, errors, sp, 13, CHUNK, torch.float64, how):
        assert max(found) <= TOLERANCE


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("how", ["autograd", "sum"])
def test_shorter_types_round_where_the_linear_does(dtype: torch.dtype, tolerance: float, how: str) -> None:
    """float32: sums of up to 24 terms. bfloat16: logits of order 3 and their gradients, each rounded to 8 bits."""
    assert max(errors(1, False, 13, CHUNK, dtype, how)) <= tolerance


def test_gradients_in_fp16_see_the_loss_scale_before_they_are_rounded() -> None:
    """Weights of 2^-24 alone leave nothing of fp16's range; scaled by 2^16 they are as good as any."""
    x, weight, labels, weights = tensors(13, torch.float16)

    def grad_x(scale: float) -> torch.Tensor:
        mine = x.clone().requires_grad_()
        told = weights * 2**-24 * scale
        (output(1, False, 13, weight, chunk_tokens=CHUNK)(mine, labels, told) * told).sum().backward()
        return mine.grad.double() / scale

    exact = [x.double().requires_grad_(), weight.double()]
    loss = cross_entropy(exact[0] @ exact[1].T, labels, vocab_size=13)
    (expected,) = torch.autograd.grad((loss * weights.double() * 2**-24).sum(), exact[:1])
    assert distance(grad_x(2.0**16), expected) < 0.01
    assert distance(grad_x(1.0), expected) > 0.1


def test_what_is_differentiated_must_be_what_forward_was_told() -> None:
    x, weight, labels, weights = tensors(13)
    loss = output(1, False, 13, weight)(x.requires_grad_(), labels, weights)
    with pytest.raises(RuntimeError, match="other weights of its tokens than forward was told"):
        (2 * loss * weights).sum().backward()


def test_without_weights_the_logits_are_kept_and_anything_may_be_differentiated() -> None:
    x, weight, labels, weights = tensors(13)
    ours, mine = output(1, False, 13, weight), x.requires_grad_()
    loss = ours(mine, labels)
    (loss * weights).square().sum().backward()
    expected = cross_entropy(x @ weight.T, labels, vocab_size=13)
    (expected_grad,) = torch.autograd.grad((expected * weights).square().sum(), x)
    assert distance(mine.grad, expected_grad) <= TOLERANCE


def test_nothing_is_differentiated_in_a_validation() -> None:
    x, weight, labels, weights = tensors(13)
    ours = output(1, False, 13, weight, chunk_tokens=CHUNK)
    trained = ours(x.requires_grad_(), labels, weights)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        assert torch.equal(ours(x, labels, weights), trained)
    assert flops.get_total_flops() == 2 * S * B * H * PADDED
    assert torch.equal(ours(x), x @ ours.weight.T), "without labels the logits"


def test_no_product_is_taken_twice() -> None:
    """A third of the training FLOPs each: forward's product and the two of backward."""
    x, weight, labels, weights = tensors(13)
    with FlopCounterMode(display=False) as flops:
        (
            output(1, False, 13, weight, chunk_tokens=CHUNK)(x.requires_grad_(), labels, weights) * weights
        ).sum().backward()
    assert flops.get_total_flops() == 6 * S * B * H * PADDED


def without_own_part(size: int) -> list[float]:
    """Each rank takes its own part of the softmax for the whole."""

    def own(logits, labels, vocabulary):
        with mock.patch.object(vocab_loss, "all_gather", lambda x, group: x.repeat(group.size, 1)):
            return right(logits, labels, vocabulary)

    right = vocab_loss._statistics
    with mock.patch.object(vocab_loss, "_statistics", own):
        return errors(size, False, 13)


def without_sum_of_grad_x(size: int) -> list[float]:
    with mock.patch.object(vocab_loss, "all_reduce_", lambda x, group: x):
        return errors(size, False, 13)


@pytest.mark.parametrize("mutant", [without_own_part, without_sum_of_grad_x])
def test_a_missing_collective_shows(pool, mutant) -> None:
    assert all(max(found) > 10 * TOLERANCE for found in on_ranks(pool, 2, mutant))


def collectives(size: int, sp: bool) -> tuple[Counter[str], Counter[str]]:
    x, weight, labels, weights = tensors(13)
    mine = share(x, tp_group(size)) if sp else x.requires_grad_()
    ours = output(size, sp, 13, weight, chunk_tokens=12)
    with CountCollectives() as forward:
        loss = ours(mine, labels, weights)
    with CountCollectives() as backward:
        (loss * weights).sum().backward()
    return forward.counts, backward.counts


@pytest.mark.parametrize(
    ("sp", "expected"), [(False, {"all_gather": 2, "all_reduce": 1}), (True, {"all_gather": 3, "reduce_scatter": 1})]
)
def test_one_collective_a_chunk_and_x_gathered_once(pool, sp: bool, expected: dict[str, int]) -> None:
    assert on_ranks(pool, 2, collectives, sp) == [(expected, {})] * 2


def test_no_more_than_one_chunk_of_logits_exists_and_little_is_kept() -> None:
    x, weight, labels, weights = tensors(13)
    shapes: list[tuple[int, ...]] = []
    right = vocab_loss.matmul
    kept: list[torch.Tensor] = []
    ours = output(1, False, 13, weight, chunk_tokens=CHUNK)

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        shapes.append((a.shape[0], b.shape[1]))
        return right(a, b)

    with (
        mock.patch.object(vocab_loss, "matmul", product),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t),
    ):
        ours(x.requires_grad_(), labels, weights)
    logits = [rows for rows, columns in shapes if columns == PADDED]
    assert logits == [CHUNK, CHUNK, CHUNK, CHUNK, S * B - 4 * CHUNK]
    assert [t.shape for t in kept] == [ours.weight.shape, labels.shape], "and the gradient of x"


Z = 0.03


def family_errors(size: int, sp: bool, chunk: int, how: str, ties: bool) -> list[float]:
    """``errors`` of a head with rows of length 1 and a max-z loss; with ``ties`` two columns of two ranks are equal."""
    group = tp_group(size)
    x, weight, labels, weights = tensors(13)
    if ties:
        weight[9] = weight[2]
        x[0] = weight[2] * 3  # the largest logit is that of both
    full = [value.clone().requires_grad_() for value in (x, weight)]
    rows = full[1][:13] / full[1][:13].norm(dim=1, keepdim=True)
    logits = full[0] @ rows.T
    expected = torch.stack((cross_entropy(logits, labels, vocab_size=13), Z * logits.amax(-1) ** 2))
    expected_grads = torch.autograd.grad((expected * weights).sum(), full)

    ours = output(size, sp, 13, weight, chunk_tokens=chunk, unit_rows=True, max_z_loss=Z)
    queue, total = ours.placement.weight_grads, torch.zeros(ours.weight.shape, dtype=torch.float64)
    if "sum" in how:
        queue.accumulate_into({ours.weight: MainGrad(total, lambda: None)})
    mine = share(x, group) if sp else x.clone().requires_grad_()
    loss = ours(mine, labels, weights)
    with queue.deferring("W") if "owed" in how else nullcontext():
        (loss * weights).sum().backward()
    if "owed" in how:
        queue.pay("W")
    grad_weight = total if "sum" in how else ours.weight.grad
    assert mine.grad is not None
    with torch.no_grad():
        assert torch.equal(ours(mine, labels), loss), "the same without gradients"
    return [
        distance(loss, expected),
        distance(mine.grad, expected_grads[0].chunk(size)[group.rank] if sp else expected_grads[0]),
        float((grad_weight - share(expected_grads[1], group)).detach().norm() / expected_grads[1].norm()),
    ]


@pytest.mark.parametrize(("size", "sp"), [(1, False), (2, True), (4, False)])
@pytest.mark.parametrize("chunk", [0, CHUNK])
@pytest.mark.parametrize("how", ["autograd", "owed", "sum", "owed sum"])
def test_a_head_of_unit_rows_with_a_max_z_loss(pool, size: int, sp: bool, chunk: int, how: str) -> None:
    for found in on_ranks(pool, size, family_errors, sp, chunk, how, how == "autograd"):
        assert max(found) <= TOLERANCE
