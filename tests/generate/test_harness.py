"""What the harness is told: without it, and, where it is installed, a task of its own on a local file."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.data.tokenizer import Tokenizer
from megatron_aquila.data.tokenizer_training import train_tokenizer
from megatron_aquila.errors import AquilaError
from megatron_aquila.generate.generate import generate
from megatron_aquila.generate.harness import Answers, harness_model, rolling_windows, run_tasks
from megatron_aquila.generate.runner import Layout
from megatron_aquila.generate.sampling import Sampling
from megatron_aquila.verify.pool import WorkerPool
from tests.generate.models import ALONE, runner_of, save_llama

pytest.importorskip("transformers", reason="the models are transformers' (extra hf)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("harness")
    save_llama(path, vocab_size=280)
    return path


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    return answers_with(folder, ALONE)


def answers_with(folder: Path, layout: Layout) -> Answers:
    tokenizer: Tokenizer = train_tokenizer(["the sea and the stars 海上的星星"] * 4, 280)
    return Answers(runner_of(folder, layout, torch.float64), tokenizer, batch=3)


def test_a_continuation_is_scored_after_its_context(answers: Answers) -> None:
    context, continuation = [5, 6, 7], [8, 9]
    ((value, greedy),) = answers.continuations([(context, continuation)])
    ((whole, _),) = answers.continuations([(context[:1], context[1:] + continuation)])
    ((head, _),) = answers.continuations([(context[:1], context[1:])])
    assert value == pytest.approx(whole - head, rel=1e-12)
    assert not greedy


def test_what_is_greedy_is_said_to_be(answers: Answers) -> None:
    prompt = answers.tokenizer.encode("stars")
    likeliest = max(range(280), key=lambda token: answers.continuations([(prompt, [token])])[0][0])
    found = answers.continuations([(prompt, [likeliest]), (prompt, [(likeliest + 1) % 280])])
    assert [greedy for _, greedy in found] == [True, False]
    likely = Sampling(temperature=0.0)
    (made,) = generate(answers.runner, [prompt], decode=answers.tokenizer.decode, how=likely, max_new_tokens=3)
    assert answers.continuations([(prompt, made.tokens)])[0][1] is True


def test_a_context_that_is_too_long_loses_its_beginning(answers: Answers) -> None:
    longest = answers.runner.shape.seq_len
    context = [(7 * number) % 250 for number in range(2 * longest)]
    long, cut = answers.continuations([(context, [9]), (context[-longest:], [9])])
    assert long == cut


def test_a_whole_text_is_the_sum_of_its_tokens(answers: Answers) -> None:
    text = "the stars and the sea"
    ids = answers.tokenizer.encode(text)
    ((expected, _),) = answers.continuations([([answers.begin], ids)])
    assert answers.whole([text, ""]) == [pytest.approx(expected, rel=1e-12), 0]


@given(st.integers(0, 40), st.integers(1, 9))
def test_every_token_is_predicted_once(size: int, longest: int) -> None:
    windows = rolling_windows(range(size + 1), longest)
    assert [token for _, predicted in windows for token in predicted] == list(range(1, size + 1))
    for context, predicted in windows:
        assert context[-1] + 1 == predicted[0]
        assert len(context) + len(predicted) <= longest + 1
    assert all(len(predicted) == longest for (_, predicted), _ in pairwise(windows))


def test_texts_end_at_the_words_that_end_them(answers: Answers) -> None:
    settings = {"until": ["\n\n"], "max_gen_toks": 6}
    first, second, third = answers.texts([("the sea", settings), ("", settings), ("a", settings | {"max_gen_toks": 2})])
    assert answers.texts([("the sea", settings)]) == [first]
    ending = {"until": first[1:3], "max_gen_toks": 6}
    assert answers.texts([("the sea", ending)]) == [first[: first.find(first[1:3])]]
    assert isinstance(second + third, str)


def test_ranks_that_share_texts_answer_the_same(
    folder: Path, answers: Answers, pool: Callable[[int], WorkerPool]
) -> None:
    alone = answered(answers)
    assert pool(2).run(answers_on_ranks, folder, Layout(cp=2)) == [alone, alone]


def answers_on_ranks(folder: Path, layout: Layout) -> list[list[Any]]:
    return answered(answers_with(folder, layout))


def answered(answers: Answers) -> list[list[Any]]:
    """Log probabilities to twelve digits."""
    pairs = [([5, 6, 7], [8, 9]), ([4], [3]), (list(range(40)), list(range(100, 130)))]
    scored = [(f"{value:.12g}", greedy) for value, greedy in answers.continuations(pairs)]
    whole = [f"{value:.12g}" for value in answers.whole(["the sea", "海" * 30])]
    settings = {"until": ["\n\n"], "max_gen_toks": 6}
    return [scored, whole, answers.texts([("the sea", settings), ("", settings)])]


def test_it_needs_a_token_to_begin_with(answers: Answers, tokenizer_without: Tokenizer) -> None:
    with pytest.raises(AquilaError, match="no token for a text to begin with"):
        Answers(answers.runner, tokenizer_without, batch=1)


@pytest.fixture
def tokenizer_without(answers: Answers) -> Tokenizer:
    from dataclasses import replace

    return replace(answers.tokenizer, bos_token=None, eod_token=None)


def test_without_the_package(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(AquilaError, match=r"pip install 'megatron_aquila\[lm-eval\]'"):
        harness_model(answers)


def test_tasks_on_a_local_file(answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="the harness is an extra (lm-eval)")
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = list(range(1, 12))
    theirs = [make_disjoint_window(w) for w in get_rolling_token_windows(ids, 0, max_seq_len=4, context_len=1)]
    assert rolling_windows([0, *ids], 4) == [(list(context), list(predicted)) for context, predicted in theirs]

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = [{"q": "the sea", "a": " and", "b": " the"}, {"q": "the", "a": " stars", "b": " sea"}]
    (tmp_path / "data.json").write_text("".join(json.dumps(one) + "\n" for one in questions))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.json")}},
        "test_split": "test",
        "target_delimiter": "",
        "doc_to_text": "{{q}}",
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{[a, b]}}", "doc_to_target": 0}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}"}
    free = {"output_type": "generate_until", "doc_to_target": "{{a}}"}
    metrics = {"choice": ["acc"], "rolling": ["word_perplexity"], "free": ["exact_match"]}
    for name, task in {"choice": choice, "rolling": rolling, "free": free}.items():
        listed = [{"metric": metric} for metric in metrics[name]]
        until = {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}} if name == "free" else {}
        text = json.dumps(common | task | until | {"task": f"local_{name}", "metric_list": listed})
        (tmp_path / f"{name}.yaml").write_text(text)  # JSON is YAML
    tasks = ["local_choice", "local_rolling", "local_free"]
    found = run_tasks(answers, tasks, folder=tmp_path, limit=None)
    assert set(found) == set(tasks)

    def right(question: dict[str, str]) -> bool:
        encode = answers.tokenizer.encode
        context = encode(question["q"])
        values = [
            answers.continuations([(context, encode(question["q"] + question[name])[len(context) :])])[0][0]
            for name in "ab"
        ]
        return values[0] > values[1]

    assert found["local_choice"]["acc,none"] == sum(map(right, questions)) / 2
    with pytest.raises(AquilaError, match="--tasks nothing: the harness knows no such task"):
        run_tasks(answers, ["nothing"], folder=tmp_path, limit=None)
