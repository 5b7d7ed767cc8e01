import pytest
import torch

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
