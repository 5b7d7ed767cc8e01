import pytest
import torch

from megatron_aquila.kernels.attention import causal_attention_reference
from megatron_aquila.kernels.scores import Scores
from megatron_aquila.kernels.two_range import Ranges
from megatron_aquila.model.cache import KVCache


def test_positions_count_from_each_rows_first_token() -> None:
    cache = KVCache(1, 6, torch.tensor([0, 2]))
    assert cache.extend(4).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert cache.extend(1).tolist() == [[4], [2]]
    assert cache.visible_BST is not None
    assert cache.visible_BST.tolist() == [[[True] * 5], [[False, False, True, True, True]]]


def test_padding_sees_itself_alone_and_is_seen_by_none() -> None:
    cache = KVCache(1, 4, torch.tensor([2, 0]))
    cache.extend(4)
    assert cache.visible_BST is not None
    assert cache.visible_BST[0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_without_padding_there_is_no_mask_and_no_room_beyond_the_end() -> None:
    cache = KVCache(1, 2, torch.tensor([0]))
    cache.extend(2)
    assert cache.visible_BST is None
    with pytest.raises(AssertionError, match="3 tokens in a cache of 2"):
        cache.extend(1)


@pytest.mark.parametrize(
    "scores",
    [
        Scores(slopes=(0.5, 0.25, 0.125, 0.0625), clamp=0.7),
        Scores(ranges=Ranges(threshold=3, factor=2.5, base=100.0), clamp=0.7),
    ],
    ids=["alibi", "two ranges"],
)
def test_scores_that_change_are_changed_of_cached_tokens_too(scores: Scores) -> None:
    """Token by token what the whole sequence gives at once."""
    q, k, v = (torch.randn(7, 2, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    expected = causal_attention_reference(q, k, v, scores=scores)
    cache = KVCache(1, 7, torch.tensor([0, 0]), scores=scores)
    found = []
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        cache.extend(stop - start)
        found.append(cache.layers[0](q[start:stop], k[start:stop], v[start:stop]))
    torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=1e-14)
    assert (expected - causal_attention_reference(q, k, v)).abs().max() > 1e-2, "the test can fail"
