import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_aquila.kernels.cross_entropy import (
    cross_entropy,
    softmax_gradient_,
    softmax_gradient_triton_,
    softmax_statistics,
    softmax_statistics_triton,
)
from megatron_aquila.parallel.max_logit import Top
from tests.kernels.triton.common import DEVICE, DTYPES, EPS32, draw, unit, worst

Z = 0.25  # of the max-z loss
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy, which interprets


def labels_of(logits: Tensor, num_real: int) -> tuple[Tensor, Tensor]:
    """Columns and whether they are mine: of every second row, the others' labels are on another rank."""
    rows = torch.arange(logits.shape[0])
    is_mine = (rows % 2 == 0) & (num_real > 0)
    return (rows * 7919 % max(num_real, 1)).where(is_mine, 0).to(DEVICE), is_mine.to(DEVICE)


def outcome(statistics, gradient, logits: Tensor, num_real: int, weights: Tensor, has_top: bool) -> list[Tensor]:
    """Statistics, and the gradient with those of the reference in float64: what is measured is one kernel's error."""
    columns, is_mine = labels_of(logits, num_real)
    found = statistics(logits, columns, is_mine, num_real=num_real, with_top=has_top)
    exact = softmax_statistics(logits.double(), columns, is_mine, num_real=num_real, with_top=has_top).to(found.dtype)
    top = (exact[2], 2 * Z * exact[2] / exact[3]) if has_top else ()
    place = logits.clone(memory_format=torch.preserve_format)
    weights = weights.to(found.dtype)
    assert gradient(place, columns, is_mine, exact[0], weights, num_real=num_real, top=top) is None
    return [found, place]


def bounds(logits: Tensor, num_real: int, weights: Tensor, right: list[Tensor]) -> list[Tensor]:
    """A sum has the roundings of its blocks, of exp, whose argument's error grows with it, and of the logarithm."""
    found, grad = right
    off = 64 * EPS32 * (1 + found.abs())
    off[1] = 0  # the label's logit is as it was
    reach = weights.double().abs().unsqueeze(1) * (1 + (found[2:3].T.abs() if len(found) > 2 else 0))
    away = (logits.double() - found[0].unsqueeze(1)).abs().nan_to_num(nan=0, posinf=0)  # exp of -inf is exact
    softmax = (logits.double() - found[0].unsqueeze(1)).exp().nan_to_num(nan=0)
    return [off, unit(logits.dtype) * grad.abs() + EPS32 * (8 * reach + (8 + 4 * away) * softmax * reach)]


def held(
    logits: Tensor,
    num_real: int,
    has_top: bool = False,
    statistics=softmax_statistics_triton,
    gradient=softmax_gradient_triton_,
) -> float:
    """The largest error as a share of what is allowed."""
    weights = draw(logits.shape[0])
    ours = outcome(statistics, gradient, logits, num_real, weights, has_top)
    right = outcome(softmax_statistics, softmax_gradient_, logits.double(), num_real, weights, has_top)
    assert ours[0].dtype is torch.float32
    assert (ours[1][:, num_real:] == 0).all(), "a padded column has a gradient"
    infinite = right[0].isinf()
    assert torch.equal(ours[0].double()[infinite], right[0][infinite])
    ours[0], right[0] = (found.where(~infinite, 0) for found in (ours[0], right[0]))
    return max(map(worst, ours, right, bounds(logits, num_real, weights, right)))


@pytest.mark.parametrize("has_top", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(dtype: torch.dtype, has_top: bool) -> None:
    logits = 3 * draw(6, 300, dtype=dtype)
    logits[:, 290:] = 1e4  # padding that would rule the softmax
    assert held(logits, 290, has_top) <= 1


@settings(max_examples=12)
@given(
    rows=st.integers(0, 4),
    columns=st.integers(1, 40),
    padding=st.integers(0, 40),
    has_top=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_small_shape(rows: int, columns: int, padding: int, has_top: bool, dtype: torch.dtype) -> None:
    num_real = max(columns - padding, 1 if has_top else 0)
    assert held(2 * draw(rows, columns, dtype=dtype), num_real, has_top) <= 1


@pytest.mark.parametrize(("columns", "num_real"), [(8192, 8192), (9000, 8999), (8200, 4096), (8200, 4097), (9000, 40)])
def test_rows_of_several_blocks(columns: int, num_real: int) -> None:
    """Columns that are no multiple of a block, and blocks of nothing but padding."""
    logits = draw(3, columns)
    logits[0, num_real - 1] = logits[1, 0] = 20  # the largest comes last, and first
    assert held(logits, num_real, True) <= 1


def test_rows_that_lie_apart_and_rows_of_one_column() -> None:
    wide = draw(9, 64, dtype=torch.bfloat16)
    for logits in (wide[::2], wide[:, 8:50], wide[1:2], wide[:, 3:4]):
        assert held(logits, logits.shape[1]) <= 1
    columns, is_mine = labels_of(wide[::2], 40)
    kept, weights = wide.clone(), draw(5)
    log_sum = softmax_statistics(wide[::2, :42], columns, is_mine, num_real=40)[0]
    softmax_gradient_triton_(wide[::2, :42], columns, is_mine, log_sum, weights, num_real=40)
    assert torch.equal(wide[1::2], kept[1::2]), "rows between are left alone"
    assert torch.equal(wide[:, 42:], kept[:, 42:]), "and columns beside"
    assert not torch.equal(wide[::2, :42], kept[::2, :42])


def test_rows_further_away_than_an_int32_counts() -> None:
    """4 GiB that are asked for and hardly touched."""
    apart = torch.empty(2**31 + 40, dtype=torch.float16, device=DEVICE).as_strided((3, 40), (2**30, 1))
    logits = draw(3, 40, dtype=torch.float16)
    apart.copy_(logits)
    columns, is_mine = labels_of(logits, 37)
    found = [softmax_statistics_triton(x, columns, is_mine, num_real=37, with_top=True) for x in (apart, logits)]
    assert torch.equal(*found)
    for x in (apart, logits):
        softmax_gradient_triton_(x, columns, is_mine, found[0][0], draw(3).fill_(1), num_real=37)
    assert torch.equal(apart, logits)


@pytest.mark.parametrize("has_top", [False, True])
def test_extreme_logits(has_top: bool) -> None:
    """Equal, very large and very small ones, columns that are masked by -inf; of a row of those nothing is a number."""
    logits = draw(8, 5000)
    logits[0] = 7.0
    logits[1] = 1e4
    logits[2] = -1e4
    logits[3, 1::2] = -torch.inf
    logits[4, :4096] = -torch.inf  # the first block whole
    logits[5, 4096:] = -torch.inf
    logits[6] *= 1e4
    logits[7, 4999] = 3e4
    for dtype in DTYPES:
        assert held(logits.to(dtype), 5000, has_top) <= 1


@pytest.mark.parametrize("values", [[-torch.inf], [torch.inf, 1.0], [torch.nan, 1.0, 2.0], [torch.inf, torch.nan]])
def test_what_is_not_finite_is_what_it_is_in_the_reference(values: list[float]) -> None:
    logits = torch.tensor(values).repeat(1, 6)[:, :6].to(DEVICE)
    label = (torch.tensor([1], device=DEVICE), torch.tensor([True], device=DEVICE))
    ours, right = (
        statistics(logits, *label, num_real=6, with_top=True)
        for statistics in (softmax_statistics_triton, softmax_statistics)
    )
    assert torch.equal(ours[:3].nan_to_num(nan=-1.5), right[:3].nan_to_num(nan=-1.5))
    grads = [logits.clone(), logits.clone()]
    for gradient, grad in zip((softmax_gradient_triton_, softmax_gradient_), grads, strict=True):
        gradient(grad, *label, right[0], torch.ones(1, device=DEVICE), num_real=6)
    assert torch.equal(grads[0].isfinite(), grads[1].isfinite())


def test_a_rank_without_real_columns_adds_nothing() -> None:
    logits, nothing = draw(3, 24, dtype=torch.bfloat16), torch.zeros(3, device=DEVICE)
    label = (nothing.long(), nothing.bool())
    ours = softmax_statistics_triton(logits, *label, num_real=0, with_top=True)
    assert torch.equal(ours, softmax_statistics(logits, *label, num_real=0, with_top=True))
    softmax_gradient_triton_(logits, *label, nothing, nothing + 1, num_real=0)
    assert (logits == 0).all()


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_that_split_the_columns_make_the_whole_loss(num_ranks: int) -> None:
    """With 4 the last has nothing but padding. Every label is on one rank, and a largest logit may be on two."""
    num_real, rows = 70, torch.arange(12, device=DEVICE)
    logits, labels, weights = 3 * draw(12, 96), rows * 997 % num_real, draw(12)
    logits[0, [3, 69]] = 20
    logits[:, num_real:] = 1e3
    leaf = logits.double().requires_grad_()
    real = leaf[:, :num_real]
    loss = cross_entropy(leaf, labels, vocab_size=num_real)
    z_loss = Z * real.amax(-1).square()
    (expected,) = torch.autograd.grad(((loss + z_loss) * weights.double()).sum(), leaf)

    size = 96 // num_ranks
    columns = [labels - rank * size for rank in range(num_ranks)]
    counts = [min(max(num_real - rank * size, 0), size) for rank in range(num_ranks)]
    shards = [shard.clone() for shard in logits.split(size, dim=1)]
    mine = [(column >= 0) & (column < count) for column, count in zip(columns, counts, strict=True)]
    ranks = [*zip(shards, [c.where(m, 0) for c, m in zip(columns, mine, strict=True)], mine, counts, strict=True)]
    found = [softmax_statistics_triton(*of_rank, num_real=count, with_top=True) for *of_rank, count in ranks]
    log_sums, own, *tops = torch.stack(found, dim=1)
    log_sum, top = log_sums.logsumexp(0), Top.of_ranks(*tops)
    torch.testing.assert_close(log_sum - own.sum(0), loss.detach().float(), rtol=1e-6, atol=1e-6)
    of_top = (top.logit, 2 * Z * top.logit / top.count)
    for *of_rank, count in ranks:
        softmax_gradient_triton_(*of_rank, log_sum, weights, num_real=count, top=of_top)
    torch.testing.assert_close(torch.cat(shards, dim=1), expected.float(), rtol=1e-5, atol=1e-6)


def test_ties_share_the_largest_logits_gradient() -> None:
    logits = draw(2, 5000).clamp(max=2)
    logits[:, 40:4990:990] = 3
    columns, is_mine = labels_of(logits, 5000)
    found = softmax_statistics_triton(logits, columns, is_mine, num_real=5000, with_top=True)
    assert found[2:].tolist() == [[3, 3], [5, 5]]
    assert held(logits, 5000, True) <= 1


def test_what_it_does_not_take() -> None:
    logits, label = draw(4, 8), labels_of(draw(4, 8), 8)
    of_rows = draw(4)
    with pytest.raises(AssertionError, match="logits of a row lie 4 apart"):
        softmax_statistics_triton(draw(8, 4).T, *label, num_real=8)
    with pytest.raises(AssertionError, match=r"4 rows of logits, and \[\(4,\), \(4,\), \(3,\)"):
        softmax_gradient_triton_(logits, *label, of_rows[:3], of_rows, num_real=8)
    with pytest.raises(AssertionError, match="numbers of each row are float32"):
        softmax_gradient_triton_(logits, *label, of_rows, of_rows.double(), num_real=8)


def test_the_bounds_tell_wrong_answers() -> None:
    logits = 3 * draw(6, 300, dtype=torch.bfloat16)

    def with_padding(logits, columns, is_mine, *, num_real, with_top):
        return softmax_statistics(logits, columns, is_mine, num_real=num_real + 1, with_top=with_top)

    def of_others_labels(logits, columns, is_mine, *args, **settings):
        softmax_gradient_(logits, columns, torch.ones_like(is_mine), *args, **settings)

    def twice_rounded(logits, columns, is_mine, log_sum, *args, **settings):
        softmax_gradient_(logits, columns, is_mine, log_sum + 2**-5, *args, **settings)

    assert held(logits, 290, statistics=with_padding) > 10
    assert held(logits, 290, gradient=of_others_labels) > 10
    assert held(logits, 290, gradient=twice_rounded) > 2
