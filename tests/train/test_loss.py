import pytest
import torch

from megatron_aquila.parallel.batch import Batch
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.train.loss import LossSums


def batch(mask: list[list[float]], sources: list[int]) -> Batch:
    mask_BS = torch.tensor(mask)
    ids = torch.zeros_like(mask_BS, dtype=torch.int64)
    return Batch(tokens_BS=ids, labels_BS=ids, loss_mask_BS=mask_BS, positions_BS=ids, source_B=torch.tensor(sources))


def test_loss_is_a_sum_over_tokens_never_a_mean_of_means() -> None:
    sums = LossSums(["a", "b", "unused"], num_tokens=3, device=torch.device("cpu"))
    batches = sums.weigh([batch([[1.0, 1.0]], [0]), batch([[1.0, 0.0]], [1])])
    first = sums.loss(torch.tensor([[1.0], [2.0]], dtype=torch.float64), batches[0])
    second = sums.loss(torch.tensor([[6.0], [9.0]], dtype=torch.float64), batches[1])
    assert float(first + second) == pytest.approx((1 + 2 + 6) / 3, rel=1e-15)
    assert float(first + second) != ((1 + 2) / 2 + 6) / 2, "a mean of means would pass"
    means = sums.means(ParallelContext.single())
    assert means.loss == 3.0
    assert means.by_source == {"a": 1.5, "b": 6.0}


def test_a_step_without_labels_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="label"):
        LossSums(["a"], num_tokens=0, device=torch.device("cpu"))


def test_the_loss_scale_multiplies_what_is_differentiated_and_not_what_is_reported() -> None:
    sums = LossSums(["a"], num_tokens=2, device=torch.device("cpu"), loss_scale=8.0)
    (weighed,) = sums.weigh([batch([[1.0, 1.0]], [0])])
    loss_SB = torch.tensor([[1.0], [2.0]], requires_grad=True)
    scaled = sums.loss(loss_SB, weighed)
    scaled.backward()
    assert scaled.item() == 12.0
    assert torch.equal(loss_SB.grad, weighed.loss_mask_BS.t() * weighed.loss_weight), (
        "what forward was told, bit by bit"
    )
    assert sums.means(ParallelContext.single()).loss == 1.5


def test_a_batch_that_was_not_weighed_is_our_mistake() -> None:
    sums = LossSums(["a"], num_tokens=2, device=torch.device("cpu"))
    with pytest.raises(AssertionError, match="not weighed"):
        sums.loss(torch.tensor([[1.0], [2.0]]), batch([[1.0, 1.0]], [0]))
