import pytest
import torch

from megatron_aquila.kernels.cross_entropy import (
    WIDE_ELEMENTS,
    _wide_rows,
    cross_entropy,
    softmax_gradient_,
    softmax_statistics,
)
from megatron_aquila.plan import loss_chunks


def test_equals_torch_and_leaves_padding_out() -> None:
    logits, labels = torch.randn(5, 2, 16, dtype=torch.float64), torch.randint(13, (5, 2))
    ours = cross_entropy(logits, labels, vocab_size=13)
    theirs = torch.nn.functional.cross_entropy(logits[..., :13].flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(ours.flatten(), theirs, rtol=0, atol=1e-14)
    assert (cross_entropy(logits, labels, vocab_size=16) - ours).abs().min() > 1e-3, "padding in the softmax must show"


def test_computes_in_float32_or_wider() -> None:
    logits, labels = torch.randn(5, 2, 16), torch.randint(13, (5, 2))
    assert cross_entropy(logits.bfloat16(), labels, vocab_size=13).dtype is torch.float32
    assert cross_entropy(logits.double(), labels, vocab_size=13).dtype is torch.float64


def test_what_is_wide_at_once_is_planned() -> None:
    assert WIDE_ELEMENTS == loss_chunks.WIDE_ELEMENTS
    for columns in (1, 25_024, 100_096, 2**25):
        logits = torch.empty(1, columns, device="meta")
        assert _wide_rows(logits, WIDE_ELEMENTS) == loss_chunks.wide_rows(columns)


@pytest.mark.parametrize("wide", [1, 3 * 16, 10 * 16])
def test_statistics_and_gradient_do_not_depend_on_how_much_is_wide_at_once(wide: int) -> None:
    logits, labels, weights = torch.randn(7, 16, dtype=torch.float64), torch.randint(13, (7,)), torch.rand(7).double()
    logits[:, 13:] = 1e4
    is_mine = torch.ones(7, dtype=torch.bool)
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, labels, vocab_size=13)
    (expected,) = torch.autograd.grad((loss * weights).sum(), leaf)
    log_sum, label = softmax_statistics(logits, labels, is_mine, num_real=13, wide_elements=wide)
    assert torch.allclose(log_sum - label, loss, rtol=0, atol=1e-13)
    softmax_gradient_(logits, labels, is_mine, log_sum, weights, num_real=13, wide_elements=wide)
    assert torch.allclose(logits, expected, rtol=0, atol=1e-14)
    assert (logits[:, 13:] == 0).all()


def test_a_rank_without_real_columns_adds_nothing() -> None:
    logits, labels, none = torch.randn(3, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)
    log_sum, label = softmax_statistics(logits, labels, none, num_real=0)
    assert (log_sum == -torch.inf).all()
    assert (label == 0).all()
    softmax_gradient_(logits, labels, none, log_sum, torch.ones(3), num_real=0)
    assert (logits == 0).all()
