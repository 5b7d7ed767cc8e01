"""Every pair of tokens that attention needs meets in exactly one block, whatever the shards and documents."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.plan.sequence import ring_blocks, shard_pieces


@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_ranks_hold_every_token_once(method, cp):
    held = [
        [token for piece in shard_pieces(24, cp=cp, rank=rank, method=method) for token in piece] for rank in range(cp)
    ]
    assert sorted(token for tokens in held for token in tokens) == list(range(24))
    assert all(tokens == sorted(tokens) for tokens in held)
    assert {len(tokens) for tokens in held} == {24 // cp}


def test_a_ring_holds_head_and_tail_and_ulysses_one_piece():
    assert shard_pieces(16, cp=2, rank=1) == (range(4, 8), range(8, 12))
    assert shard_pieces(16, cp=2, rank=0) == (range(4), range(12, 16))
    assert shard_pieces(16, cp=2, rank=1, method="ulysses") == (range(8, 16),)
    assert shard_pieces(15, cp=1, rank=0) == (range(15),)


def test_what_does_not_divide_is_refused():
    with pytest.raises(AssertionError, match="18 tokens do not divide into 4 pieces"):
        shard_pieces(18, cp=2, rank=0)


@given(cp=st.sampled_from([2, 3, 4]), ends=st.sets(st.integers(1, 47)), num_samples=st.sampled_from([1, 2]))
def test_every_pair_meets_once(cp, ends, num_samples):
    seq_len = 48 // num_samples
    bounds = sorted({0, *ends, *range(0, 49, seq_len)})
    document = {token: start for start, stop in pairwise(bounds) for token in range(start, stop)}
    wanted = {(q, k) for q in range(48) for k in range(q + 1) if document[q] == document[k]} if ends else None
    met = [
        pair
        for rank in range(cp)
        for owner in range(cp)
        for pair in pairs(bounds if ends else None, num_samples, seq_len, cp, rank, owner)
    ]
    if wanted is None:
        wanted = {(q, k) for q in range(48) for k in range(q // seq_len * seq_len, q + 1)}
    assert len(met) == len(set(met))
    assert set(met) == wanted


def pairs(bounds, num_samples, seq_len, cp, rank, owner):
    """What blocks say meets, as tokens of the microbatch."""
    held = [[t for piece in shard_pieces(seq_len, cp=cp, rank=one) for t in piece] for one in (rank, owner)]
    for block in ring_blocks(bounds, num_samples=num_samples, seq_len=seq_len, cp=cp, rank=rank, owner=owner):
        for sample in range(num_samples)[block.samples]:
            for i, query in enumerate(held[0][block.queries]):
                for j, key in enumerate(held[1][block.keys]):
                    if not block.is_causal or j <= i:
                        yield sample * seq_len + query, sample * seq_len + key


def test_a_step_of_the_ring_is_as_much_work_for_every_rank():
    work = [[len(list(pairs(None, 1, 32, 4, rank, owner))) for owner in range(4) if owner != rank] for rank in range(4)]
    assert {count for row in work for count in row} == {8 * 4}
