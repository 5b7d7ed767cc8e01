from collections import Counter
from unittest import mock

import pytest
import torch

from megatron_aquila.kernels.cross_entropy import cross_entropy
from megatron_aquila.parallel import vocab
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.parallel.vocab import VocabParallelEmbedding, vocab_parallel_argmax, vocab_parallel_cross_entropy
from tests.parallel.worlds import CPU, CountCollectives, distance, on_ranks, share, tp_group

S, B, H, PADDED = 8, 3, 5, 16
TOLERANCE = 1e-12
# With tp 4 a shard has 4 rows: none padded; one real row on the last rank; two ranks with nothing but padding.
VOCABS = [16, 13, 7]


def embedding_errors(size: int, vocab_size: int, sp: bool) -> tuple[float, float]:
    """Distance of the output and of the weight's gradient from plain indexing."""
    group, generator = tp_group(size), torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(vocab_size, (B, S), generator=generator)
    weight = torch.randn(PADDED, H, generator=generator, dtype=torch.float64, requires_grad=True)
    grad_y = torch.randn(S, B, H, generator=generator, dtype=torch.float64)
    expected = weight[tokens_BS.T]
    (expected_grad,) = torch.autograd.grad(expected, weight, grad_y)

    placement = Placement(tp=group, sequence_parallel=sp, dtype=torch.float64, device=CPU)
    ours = VocabParallelEmbedding(vocab_size, PADDED, H, placement=placement)
    with torch.no_grad():
        ours.weight.copy_(share(weight, group))
    y = ours(tokens_BS)
    y.backward(share(grad_y, group).detach() if sp else grad_y)
    assert torch.equal(y, share(expected, group) if sp else expected), "a look-up must be exact"
    rank_grad = share(expected_grad, group).detach()
    assert ours.weight.grad is not None
    real = max(0, min(vocab_size - group.rank * PADDED // size, PADDED // size))
    assert (ours.weight.grad[real:] == 0).all(), "a padded row got a gradient"
    return distance(y, expected.chunk(size)[group.rank] if sp else expected), float(
        (ours.weight.grad - rank_grad).norm() / expected_grad.norm()
    )


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("sp", [False, True])
def test_embedding_equals_indexing(pool, size: int, vocab_size: int, sp: bool) -> None:
    for errors in on_ranks(pool, size, embedding_errors, vocab_size, sp):
        assert max(errors) <= TOLERANCE


def embedding_without_mask(size: int) -> tuple[float, float]:
    def everything_is_mine(ids, shard_size, num_real, tp):
        return (ids - tp.rank * shard_size).clamp(0, shard_size - 1), torch.ones_like(ids, dtype=torch.bool)

    with mock.patch.object(vocab, "local_columns", everything_is_mine), pytest.raises(AssertionError, match="exact"):
        embedding_errors(size, 13, False)


def test_rows_of_other_ranks_taken_for_ones_own_would_show(pool) -> None:
    on_ranks(pool, 4, embedding_without_mask)


def loss_case(vocab_size: int, dtype: torch.dtype = torch.float64, padding: float = 1e4) -> list[torch.Tensor]:
    """Logits with ``padding`` in the padded columns, labels, and the gradient of the loss."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 5 * torch.randn(S, B, PADDED, generator=generator, dtype=torch.float64)
    logits[..., vocab_size:] = padding  # would rule the softmax if it entered
    labels = torch.randint(vocab_size, (S, B), generator=generator)
    labels[0] = vocab_size - 1  # the last real column, on an uneven shard
    return [logits.to(dtype), labels, torch.rand(S, B, generator=generator, dtype=torch.float64)]


def loss_errors(
    size: int, vocab_size: int, dtype: torch.dtype = torch.float64, padding: float = 1e4, counted: int | None = None
) -> tuple[float, float]:
    """Distance of loss and gradient from the plain loss in float64. ``counted``: the vocabulary we claim instead."""
    group = tp_group(size)
    logits, labels, grad = loss_case(vocab_size, dtype, padding)
    full = logits.double().requires_grad_()
    expected = cross_entropy(full, labels, vocab_size=vocab_size)
    (expected_grad,) = torch.autograd.grad(expected, full, grad)

    mine = share(logits, group, dim=2)
    loss = vocab_parallel_cross_entropy(mine, labels, tp=group, vocab_size=vocab_size if counted is None else counted)
    assert loss.dtype is torch.promote_types(dtype, torch.float32)
    loss.backward(grad.to(loss.dtype))
    assert mine.grad is not None
    real = max(0, min(vocab_size - group.rank * PADDED // size, PADDED // size))
    assert counted is not None or (mine.grad[..., real:] == 0).all(), "a padded column got a gradient"
    rank_grad = share(expected_grad, group, dim=2).detach()
    return distance(loss.detach(), expected.detach()), float((mine.grad - rank_grad).norm() / expected_grad.norm())


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("padding", [1e4, float("inf"), float("nan")])
def test_loss_equals_the_plain_one_with_gradients(pool, size: int, vocab_size: int, padding: float) -> None:
    for errors in on_ranks(pool, size, loss_errors, vocab_size, torch.float64, padding):
        assert max(errors) <= TOLERANCE


@pytest.mark.parametrize(
    # loss: 16 terms and a logarithm in float32; gradient in bfloat16: one rounding
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)],
)
def test_loss_is_computed_in_float32(pool, dtype: torch.dtype, tolerance: float) -> None:
    for loss_error, grad_error in on_ranks(pool, 2, loss_errors, 13, dtype):
        assert loss_error <= 1e-6
        assert grad_error <= tolerance


def test_padding_in_the_softmax_would_show(pool) -> None:
    for errors in on_ranks(pool, 2, loss_errors, 13, torch.float64, 1.0, PADDED):
        assert min(errors) > 10 * TOLERANCE


def loss_without_sum(size: int) -> tuple[float, float]:
    real = vocab.all_reduce_

    def only_maximum(x: torch.Tensor, group, op="sum"):
        return real(x, group, op) if op == "max" else x

    with mock.patch.object(vocab, "all_reduce_", only_maximum):
        return loss_errors(size, 16)


def loss_with_offset(size: int) -> tuple[float, float]:
    """Every rank adds the whole sum, so that the softmax's denominator is counted tp times: log(tp) too much."""
    real = vocab.all_reduce_

    def counted_twice(x: torch.Tensor, group, op="sum"):
        return real(x, group, op) if op == "max" else real(x, group) * torch.tensor([1, size])[:, None, None]

    with mock.patch.object(vocab, "all_reduce_", counted_twice):
        return loss_errors(size, 16)


@pytest.mark.parametrize("mutant", [loss_without_sum, loss_with_offset])
def test_a_wrong_sum_shows(pool, mutant) -> None:
    assert all(max(errors) > 10 * TOLERANCE for errors in on_ranks(pool, 2, mutant))


def test_gradcheck_and_large_logits() -> None:
    logits, labels, _ = loss_case(13)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_cross_entropy(x, labels[:2], tp=tp_group(1), vocab_size=13)

    assert torch.autograd.gradcheck(loss, logits[:2].requires_grad_())
    shifted = loss(logits[:2].detach().float() + 1e6)
    assert shifted.isfinite().all(), "the maximum must be taken off before exp"


def collectives_of_loss(size: int) -> tuple[Counter[str], Counter[str]]:
    logits, labels, grad = loss_case(13)
    mine = share(logits, tp_group(size), dim=2)
    with CountCollectives() as forward:
        loss = vocab_parallel_cross_entropy(mine, labels, tp=tp_group(size), vocab_size=13)
    with CountCollectives() as backward:
        loss.backward(grad)
    return forward.counts, backward.counts


def test_loss_sends_two_all_reduces_and_nothing_backward(pool) -> None:
    assert on_ranks(pool, 2, collectives_of_loss) == [({"all_reduce": 2}, {})] * 2


def test_little_is_kept_for_backward() -> None:
    logits, labels, _ = loss_case(13, torch.bfloat16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        vocab_parallel_cross_entropy(logits.requires_grad_(), labels, tp=tp_group(1), vocab_size=13)
    assert sorted(t.numel() for t in kept) == [S * B] * 3 + [S * B * PADDED]
    assert {t.dtype for t in kept if t.numel() == S * B * PADDED} == {torch.bfloat16}


def refusals(size: int) -> None:
    placement = Placement(tp=tp_group(size), sequence_parallel=False, dtype=torch.float32, device=CPU)
    with pytest.raises(AssertionError, match="17 tokens do not fit in 16 rows"):
        VocabParallelEmbedding(17, 16, H, placement=placement)
    with pytest.raises(AssertionError, match="15 rows do not split over 2 ranks"):
        VocabParallelEmbedding(13, 15, H, placement=placement)
    with pytest.raises(AssertionError, match="2 shards of 6 columns do not hold 13 tokens"):
        vocab_parallel_cross_entropy(torch.zeros(S, B, 6), torch.zeros(S, B), tp=tp_group(size), vocab_size=13)


def test_sizes_that_do_not_fit_are_refused(pool) -> None:
    on_ranks(pool, 2, refusals)


def likeliest(size: int, logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    tp = tp_group(size)
    return vocab_parallel_argmax(share(logits, tp, dim=-1), tp=tp, vocab_size=vocab_size)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_likeliest_token_is_found_whichever_rank_holds_it(pool, size: int) -> None:
    logits, vocab_size = torch.randn(50, 3, 32, dtype=torch.float64).round(decimals=0), 15  # half is padding, many ties
    logits[..., vocab_size:] = 99.0
    for found in on_ranks(pool, size, likeliest, logits, vocab_size):
        assert torch.equal(found, logits[..., :vocab_size].argmax(-1))
