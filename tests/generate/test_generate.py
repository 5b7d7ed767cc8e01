"""Greedy tokens are transformers', sampled ones the same wherever they are drawn, and rows do not see each other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_aquila.errors import DataError
from megatron_aquila.generate.generate import generate
from megatron_aquila.generate.runner import Layout
from megatron_aquila.generate.sampling import Sampling
from megatron_aquila.generate.stops import Stops
from megatron_aquila.verify.pool import WorkerPool
from tests.generate.models import ALONE, PROMPTS, SEQ_LEN, VOCAB_SIZE, run, runner_of, save_llama, words

pytest.importorskip("transformers", reason="the judge is transformers (extra hf)")

GREEDY = Sampling(temperature=0)
DRAWN = Sampling(temperature=0.9, top_k=50, top_p=0.9, repetition_penalty=1.2, seed=7)
NEW = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_llama(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> list[tuple[int, ...]]:
    """transformers' greedy continuations, prompt by prompt."""
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(folder)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
        found.append(tuple(out[0, len(prompt) :].tolist()))
    return found


def test_greedy_tokens_are_transformers(folder: Path, theirs: list[tuple[int, ...]]) -> None:
    ours = run(folder, ALONE, None, PROMPTS, GREEDY, NEW)
    assert [found.tokens for found in ours] == theirs
    assert [found.text for found in ours] == [words(tokens) for tokens in theirs]
    assert len({tokens[-1] for tokens in theirs}) > 1, "a model that always says the same proves little"
    alone = [run(folder, ALONE, None, [prompt], GREEDY, NEW)[0].tokens for prompt in PROMPTS]
    assert alone == theirs


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, pp=2),
        Layout(pp=2),
        Layout(tp=2),
        Layout(cp=4),
        Layout(cp=4, cp_method="ulysses"),
        Layout(tp=2, cp=2),
        Layout(cp=2, pp=2, cp_method="ulysses"),
    ],
    ids=str,
)
def test_greedy_tokens_are_transformers_on_any_layout(
    folder: Path, theirs: list[tuple[int, ...]], pool: Callable[[int], WorkerPool], layout: Layout
) -> None:
    for ours in pool(layout.model_ranks).run(run, folder, layout, None, PROMPTS, GREEDY, NEW):
        assert [found.tokens for found in ours] == theirs


def test_samples_are_the_same_on_any_layout(folder: Path, pool: Callable[[int], WorkerPool]) -> None:
    alone = run(folder, ALONE, torch.float64, PROMPTS, DRAWN, NEW)
    for layout in (Layout(tp=2, pp=2), Layout(cp=2, pp=2)):
        for ours in pool(4).run(run, folder, layout, torch.float64, PROMPTS, DRAWN, NEW):
            assert ours == alone
    again = run(folder, ALONE, torch.float64, PROMPTS, Sampling(temperature=0.9, seed=8), NEW)
    assert again != alone


def test_a_row_does_not_depend_on_the_others(folder: Path) -> None:
    runner = runner_of(folder, dtype=torch.float64)
    settings = {"decode": words, "how": DRAWN, "max_new_tokens": NEW}
    together = generate(runner, PROMPTS, **settings)
    for number, prompt in enumerate(PROMPTS):
        assert generate(runner, [prompt], first_row=number, **settings) == [together[number]]


def test_rows_end_where_they_are_told_to(folder: Path, theirs: list[tuple[int, ...]]) -> None:
    runner = runner_of(folder)
    end = theirs[0][4]
    word = f"{theirs[1][6]} {theirs[1][7]} "
    shown: dict[int, str] = {0: "", 1: "", 2: ""}

    def show(row: int, piece: str) -> None:
        shown[row] += piece

    found = generate(
        runner,
        PROMPTS,
        decode=words,
        how=GREEDY,
        stops=Stops(ids=frozenset([end]), words=(word,)),
        max_new_tokens=NEW,
        show=show,
    )
    first = found[0]
    assert first.is_ended
    assert first.tokens == theirs[0][: theirs[0].index(end) + 1]
    assert first.text == words(first.tokens[:-1])
    assert word not in found[1].text
    assert found[1].tokens == theirs[1][: len(found[1].tokens)]
    assert [shown[row] for row in range(3)] == [one.text for one in found]


def test_a_row_ends_with_the_models_longest_sequence(folder: Path) -> None:
    prompts = [(5,) * (SEQ_LEN - 3), (7, 8)]
    first, second = run(folder, ALONE, None, prompts, GREEDY, 10)
    assert (len(first.tokens), first.is_ended) == (3, False)
    assert len(second.tokens) == 10


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ((), "prompt 2 is empty"),
        ((1,) * SEQ_LEN, f"prompt 2 has {SEQ_LEN} tokens"),
        ((1, VOCAB_SIZE), f"prompt 2: token {VOCAB_SIZE} is outside the vocabulary of {VOCAB_SIZE}"),
    ],
)
def test_prompts_that_cannot_be_continued(folder: Path, prompt: tuple[int, ...], why: str) -> None:
    with pytest.raises(DataError, match=why):
        run(folder, ALONE, None, [(1,), prompt], GREEDY, 4)
