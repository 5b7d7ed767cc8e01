"""Scores are those of transformers, every token counts once, and the layout changes nothing."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_aquila.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_aquila.errors import DataError
from megatron_aquila.generate.runner import Layout, Runner
from megatron_aquila.generate.scoring import Score, evaluate, groups_of, position_bins, score_rows
from megatron_aquila.generate.stretch import stretched
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.verify.pool import WorkerPool
from tests.generate.models import ALONE, VOCAB_SIZE, Change, as_it_is, runner_of, save_llama

pytest.importorskip("transformers", reason="the judge is transformers (extra hf)")
SEQ_LEN, SIZES = 16, (83, 33)
NEAR = 1e-6  # transformers takes rotary tables and norms in float32 whatever the model's type


def alibi(shape: ModelShape) -> ModelShape:
    return replace(shape, position_embedding="alibi")


def clamped(shape: ModelShape) -> ModelShape:
    return replace(shape, score_clamp=0.5)


def yarn(shape: ModelShape) -> ModelShape:
    return stretched(shape, seq_len=None, scaling="yarn", factor=4.0, length=8)


def two_ranges(shape: ModelShape) -> ModelShape:
    return replace(stretched(shape, seq_len=None, scaling="two-range", factor=4.0, length=5), score_clamp=0.5)


@dataclass(frozen=True)
class Case:
    """What the model is made of, and the length of its windows."""

    change: Change = as_it_is
    seq_len: int = SEQ_LEN


PLAIN = Case()
CASES = {
    "ALiBi": Case(alibi),
    "clamp": Case(clamped),
    "yarn": Case(yarn),
    "two ranges": Case(two_ranges),
    "a length that cp does not divide": Case(alibi, 13),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scoring")
    save_llama(path)
    generator = np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        with IndexedDatasetWriter(path / f"data{number}", np.uint16) as writer:
            for part in np.array_split(generator.integers(VOCAB_SIZE, size=size), 4):
                writer.add_sequence(part)
                writer.end_document()
    return path


def scores(folder: Path, layout: Layout = ALONE, case: Case = PLAIN, *, max_tokens: int | None = None) -> list[Score]:
    datasets = [IndexedDataset(folder / f"data{number}") for number in range(len(SIZES))]
    runner = runner_of(folder, layout, torch.float64, case.change)
    return evaluate(runner, datasets, seq_len=case.seq_len, batch=2, max_tokens=max_tokens, num_bins=3)


def theirs(folder: Path, tokens: list[int]) -> tuple[float, int]:
    """Sum of transformers' losses over windows, and how many labels were the likeliest."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    loss, right = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, SEQ_LEN):
            window = torch.tensor([tokens[start : start + SEQ_LEN + 1]])
            logits, labels = model(window[:, :-1]).logits[0], window[0, 1:]
            loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(-1) == labels).sum())
    return loss, right


def test_scores_are_transformers_and_count_every_token_once(folder: Path) -> None:
    for number, found in enumerate(scores(folder)):
        tokens = IndexedDataset(folder / f"data{number}").tokens.tolist()
        loss, right = theirs(folder, tokens)
        assert (found.num_tokens, found.num_right) == (SIZES[number] - 1, right)
        assert found.loss == pytest.approx(loss / (SIZES[number] - 1), rel=NEAR)
        assert found.perplexity == pytest.approx(math.exp(found.loss))
        assert found.accuracy == right / found.num_tokens


def scores_of_all(folder: Path, layout: Layout, cases: Sequence[Case]) -> list[list[Score]]:
    return [scores(folder, layout, case) for case in cases]


def counts(found: Sequence[Score]) -> list[tuple[int, int]]:
    return [(part.num_tokens, part.num_right) for one in found for part in (one, *one.by_position)]


def losses(found: Sequence[Score]) -> list[float]:
    return [part.loss for one in found for part in (one, *one.by_position)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[list[Score]]:
    return scores_of_all(folder, ALONE, list(CASES.values()))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, pp=2),
        Layout(pp=2),
        Layout(),
        Layout(cp=4),
        Layout(cp=2),
        Layout(tp=2, cp=2),
        Layout(cp=2, pp=2),
        Layout(cp=4, cp_method="ulysses"),
        Layout(tp=2, cp=2, cp_method="ulysses"),
        Layout(cp=2, pp=2, cp_method="ulysses"),
    ],
    ids=str,
)
def test_the_layout_changes_nothing(
    folder: Path, alone: list[list[Score]], pool: Callable[[int], WorkerPool], layout: Layout
) -> None:
    """On four ranks; what the layout leaves of them is dp. Two key heads are copied where Ulysses has four ranks."""
    for by_case in pool(4).run(scores_of_all, folder, layout, list(CASES.values())):
        for case, found, expected in zip(CASES, by_case, alone, strict=True):
            assert counts(found) == counts(expected), case
            assert losses(found) == pytest.approx(losses(expected), rel=1e-13), case


def test_the_test_can_fail(folder: Path, alone: list[list[Score]], pool: Callable[[int], WorkerPool]) -> None:
    """Of other models, and of ranks that take the tokens of a ring as they lie."""
    by_case = dict(zip(CASES, map(losses, alone), strict=True))
    assert min(abs(one - other) for one, other in combinations((of[0] for of in by_case.values()), 2)) > 1e-4
    wrong = pool(4).run(scores_of_wrong_places, folder, Layout(cp=4))[0]
    assert max(abs(one - other) for one, other in zip(losses(wrong), by_case["ALiBi"], strict=True)) > 1e-3


def scores_of_wrong_places(folder: Path, layout: Layout) -> list[Score]:
    def places(runner: Runner, length: int) -> torch.Tensor:
        size = length // runner.ctx.cp.size
        return torch.arange(size) + runner.ctx.cp.rank * size

    with mock.patch.object(Runner, "places", places):
        return scores(folder, layout, CASES["ALiBi"])


def test_bins_are_means_over_places(folder: Path) -> None:
    """Against one bin a place, whose losses are those of ``score_rows``."""
    assert position_bins(16, 3) == [range(6), range(6, 11), range(11, 16)]
    tokens = IndexedDataset(folder / "data0").tokens.tolist()
    windows = [tokens[start : start + SEQ_LEN + 1] for start in range(0, SIZES[0] - 1, SEQ_LEN)]
    rows = rows_of(folder, ALONE, windows)
    for bin, part in zip(position_bins(SEQ_LEN, 3), scores(folder)[0].by_position, strict=True):
        of_bin = [row[place] for row in rows for place in bin if place < len(row)]
        assert (part.num_tokens, part.num_right) == (len(of_bin), sum(hit for _, hit in of_bin))
        assert part.name == f"{bin[0]}-{bin[-1]}"
        assert part.loss == pytest.approx(-sum(value for value, _ in of_bin) / len(of_bin), rel=1e-12)
    short = scores(folder, max_tokens=4)[0].by_position
    assert [part.num_tokens for part in short] == [4, 0, 0]
    assert math.isnan(short[1].loss)


def test_the_first_tokens_only(folder: Path) -> None:
    first, second = scores(folder, max_tokens=40)
    assert (first.num_tokens, second.num_tokens) == (40, 32)
    loss, _ = theirs(folder, IndexedDataset(folder / "data0").tokens[:41].tolist())
    assert first.loss == pytest.approx(loss / 40, rel=NEAR)


def test_rows_of_any_length(folder: Path, pool: Callable[[int], WorkerPool]) -> None:
    rows = [[5, 6, 7, 8, 9], [1], [3, 2], [], [9] * 12]
    found = rows_of(folder, ALONE, rows)
    assert [len(one) for one in found] == [4, 0, 1, 0, 11]
    for row, one in zip(rows, found, strict=True):
        if len(row) > 1:
            loss, right = theirs(folder, row)
            assert -sum(value for value, _ in one) == pytest.approx(loss, rel=NEAR)
            assert sum(hit for _, hit in one) == right
    flat = [value for one in found for value, _ in one]
    for layout in (Layout(tp=2, pp=2), Layout(cp=2, pp=2), Layout(cp=4, cp_method="ulysses")):
        for others in pool(4).run(rows_of, folder, layout, rows):
            assert [[hit for _, hit in one] for one in others] == [[hit for _, hit in one] for one in found]
            assert [value for one in others for value, _ in one] == pytest.approx(flat, rel=1e-12)


def rows_of(folder: Path, layout: Layout, rows: list[list[int]]) -> list[list[tuple[float, bool]]]:
    return score_rows(runner_of(folder, layout, torch.float64), rows, batch=2)


def test_data_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    for name, tokens in {"short": [1], "wide": [1, VOCAB_SIZE, 2]}.items():
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            writer.add_sequence(tokens)
            writer.end_document()
    runner = runner_of(folder)
    with pytest.raises(DataError, match="it has 1 tokens; there is nothing to predict"):
        evaluate(runner, [IndexedDataset(tmp_path / "short")], seq_len=4, batch=1)
    with pytest.raises(DataError, match=f"token {VOCAB_SIZE} is outside the model's vocabulary of {VOCAB_SIZE}"):
        evaluate(runner, [IndexedDataset(tmp_path / "wide")], seq_len=4, batch=1)


def test_groups() -> None:
    assert list(groups_of(range(5), 2)) == [[0, 1], [2, 3], [4]]
