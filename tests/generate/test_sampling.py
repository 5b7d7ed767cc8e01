"""Each rule against transformers' own, and the draw against the probabilities."""

import pytest
import torch

from megatron_aquila.generate.sampling import Draws, Sampling, next_tokens, nucleus, penalised, top

LOGITS = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
ROWS = [[1, 2, 2, 39], [5], [0, 7, 7]]


def test_each_rule_is_transformers() -> None:
    pytest.importorskip("transformers", reason="the judge is transformers (extra hf)")
    from transformers.generation import logits_process as theirs

    ids = torch.zeros(3, 1, dtype=torch.int64)
    for k in (1, 5, 40):
        assert torch.equal(top(LOGITS, k), theirs.TopKLogitsWarper(k)(ids, LOGITS))
    for p in (0.1, 0.5, 0.95):
        assert torch.equal(nucleus(LOGITS, p), theirs.TopPLogitsWarper(p)(ids, LOGITS))
    for row, logits in zip(ROWS, LOGITS, strict=True):
        expected = theirs.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([row]), logits[None])
        assert torch.equal(penalised(logits[None], [row], 1.7), expected)


def test_nothing_is_changed_where_nothing_is_asked() -> None:
    assert top(LOGITS, 0) is LOGITS
    assert nucleus(LOGITS, 1.0) is LOGITS
    assert penalised(LOGITS, ROWS, 1.0) is LOGITS


def test_the_likeliest_is_one_that_the_penalty_leaves() -> None:
    logits = torch.tensor([[1.0, 1.1, 0.5]])
    assert next_tokens(logits, [[2]], Sampling(temperature=0), [0.0]) == [1]
    assert next_tokens(logits, [[1]], Sampling(temperature=0, repetition_penalty=2.0), [0.0]) == [0]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits, how = torch.tensor([[2.0, 0.0, 1.0, -9.0]]), Sampling(temperature=2.0, top_k=3)
    count = 4000
    numbers = [(number + 0.5) / count for number in range(count)]
    drawn = [next_tokens(logits, [[]], how, [number])[0] for number in numbers]
    shares = torch.softmax(torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64), 0).tolist()
    for token, share in enumerate(shares):
        assert drawn.count(token) / count == pytest.approx(share, abs=1 / count)
    assert 3 not in drawn
    assert next_tokens(logits, [[]], how, [1 - 2**-53]) == [1], "the least likely of those that are left"


def test_draws_are_a_function_of_seed_and_row() -> None:
    def numbers(seed: int, row: int) -> list[float]:
        draws = Draws(seed, row)
        return [draws.draw() for _ in range(3)]

    assert numbers(1, 0) == numbers(1, 0)
    assert len({*numbers(1, 0), *numbers(1, 1), *numbers(11, 0), *numbers(0, 10)}) == 12
    assert all(0 <= number < 1 for number in numbers(5, 5))
