"""Positions of two ranges in a cache: greedy tokens are those of plain forwards over all there is, on any layout."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_aquila.generate.generate import generate
from megatron_aquila.generate.runner import Layout
from megatron_aquila.generate.sampling import Sampling
from megatron_aquila.generate.source import open_source
from megatron_aquila.generate.stretch import stretched
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.verify.pool import WorkerPool
from megatron_aquila.verify.reference import plain_logits
from tests.generate.models import ALONE, PROMPTS, runner_of, save_llama, words

pytest.importorskip("transformers", reason="makes the model (extra hf)")

NEW = 16
THRESHOLD = 5  # tokens: most pairs are far
CLAMPS = (None, 0.5)  # some scores are beyond it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_llama(path)
    return path


def two_ranges(shape: ModelShape, *, clamp: float | None) -> ModelShape:
    shape = stretched(shape, seq_len=None, scaling="two-range", factor=4.0, length=THRESHOLD)
    return replace(shape, score_clamp=clamp)


def cached(folder: Path, layout: Layout, clamp: float | None) -> list[tuple[int, ...]]:
    """Prompts of different lengths in one batch, so that rows begin late in the cache."""
    runner = runner_of(folder, layout, torch.float64, partial(two_ranges, clamp=clamp))
    found = generate(runner, PROMPTS, decode=words, how=Sampling(temperature=0), max_new_tokens=NEW)
    return [one.tokens for one in found]


def uncached(folder: Path, shape: ModelShape) -> list[tuple[int, ...]]:
    """The plain reference, each token from a forward over all before it."""
    from transformers import LlamaForCausalLM

    weights = {name: x.double() for name, x in LlamaForCausalLM.from_pretrained(folder).state_dict().items()}
    found = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(NEW):
            logits_BSV = plain_logits(weights, shape, torch.tensor([tokens]), torch.arange(len(tokens))[None])
            tokens.append(int(logits_BSV[0, -1].argmax()))
        found.append(tuple(tokens[len(prompt) :]))
    return found


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[float | None, list[tuple[int, ...]]]:
    shape = open_source(folder, tp=1).shape
    with torch.no_grad():
        found = {clamp: uncached(folder, two_ranges(shape, clamp=clamp)) for clamp in CLAMPS}
        assert uncached(folder, shape) != found[None], "the test can fail"
    return found


@pytest.mark.parametrize("clamp", CLAMPS)
def test_greedy_tokens_are_those_of_plain_forwards(folder: Path, expected, clamp: float | None) -> None:
    assert cached(folder, ALONE, clamp) == expected[clamp]
    assert expected[None] != expected[CLAMPS[1]]


@pytest.mark.parametrize(
    ("layout", "clamp"),
    [
        (Layout(tp=2, pp=2), None),
        (Layout(pp=2), None),
        (Layout(tp=2), None),
        (Layout(cp=2), None),
        (Layout(cp=4), CLAMPS[1]),
        (Layout(tp=2, cp=2, cp_method="ulysses"), CLAMPS[1]),
    ],
    ids=str,
)
def test_they_are_the_same_on_any_layout(
    folder: Path, expected, pool: Callable[[int], WorkerPool], layout: Layout, clamp: float | None
) -> None:
    for ours in pool(layout.model_ranks).run(cached, folder, layout, clamp):
        assert ours == expected[clamp]
