"""``aquila evaluate`` through its door."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.llama import llama_tensors
from megatron_aquila.commands import evaluate
from megatron_aquila.data.indexed import IndexedDatasetWriter
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.verify.pool import WorkerPool
from tests.checkpoint.numbers import save_checkpoint
from tests.checkpoint.toy import SHAPE
from tests.commands.said import said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    generator = torch.Generator().manual_seed(1)
    for run, std in {"run": 0.0, "drawn": 0.5}.items():  # in the first every token is as likely as any other
        chunks = [
            Chunk(name, size, (0,) * len(size), torch.randn(size, generator=generator) * std)
            for name, size in llama_tensors(SHAPE).items()
        ]
        save_checkpoint(root / run, 1, chunks, {"shape": asdict(SHAPE)}, ParallelContext.single())
    for name, size in {"a": 40, "b": 25}.items():
        with IndexedDatasetWriter(root / name, np.uint16) as writer:
            writer.add_sequence(np.arange(size) % SHAPE.vocab_size)
            writer.end_document()
    return root


def test_a_model_that_knows_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--load", str(folder / "run"), "--data"]
    assert evaluate.main([*load, str(folder / "a"), str(folder / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [source["tokens"] for source in found["sources"]] == [39, 24]
    assert found["total"]["tokens"] == 63
    assert found["total"]["loss"] == pytest.approx(math.log(SHAPE.vocab_size), rel=1e-6)
    assert found["total"]["perplexity"] == pytest.approx(SHAPE.vocab_size, rel=1e-5)
    assert found["sources"][0]["accuracy"] == 0  # of equals the first is the likeliest, and 0 is no label here
    assert evaluate.main([*load, "3", str(folder / "a"), "1", str(folder / "b"), "--seq-len", "7"]) == 0
    head, first, second, whole = capsys.readouterr().out.splitlines()
    assert head.split() == ["source", "tokens", "loss", "perplexity", "accuracy"]
    assert first.split()[1:] == ["39", "3.7842", "44.000", "0.00%"]
    assert second.split()[1:3] == ["24", "3.7842"]
    assert whole.startswith("all, by weight")


def test_by_position(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--load", str(folder / "run"), "--data"]
    both = [str(folder / "a"), str(folder / "b")]
    assert evaluate.main([*load, *both, "--by-position", "3", "--json"]) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert [(bin["first"], bin["last"], bin["tokens"]) for bin in found["total"]["by_position"]] == [
        (0, 5, 3 * 6 + 2 * 6),
        (6, 10, (2 * 5 + 1) + (5 + 2)),
        (11, 15, 2 * 5 + 5),
    ]
    assert [bin["tokens"] for bin in found["sources"][1]["by_position"]] == [12, 7, 5]
    assert not out.err
    assert evaluate.main([*load, "1", both[0], "3", both[1], "--seq-len", "32", "--by-position", "2"]) == 0
    out = capsys.readouterr()
    assert "samples of 32 tokens, have tokens that count 32 apart; in training they were at most 16 apart" in out.err
    *_, empty, head, first, second = out.out.splitlines()
    assert not empty
    assert head.split() == ["positions", "tokens", "loss", "perplexity", "accuracy"]
    assert first.split()[:3] == ["0-15", "39", "3.7842"]
    assert second.split()[:3] == ["16-31", "24", "3.7842"]


def test_two_ranges_are_evaluated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--load", str(folder / "run"), "--data", str(folder / "a"), "--seq-len", "32"]
    ranges = ["--rope-scaling", "two-range", "--rope-factor", "3", "--rope-trained-len", "8"]  # 8 + 24 / 3 = 16
    assert evaluate.main([*argv, *ranges]) == 0
    out = capsys.readouterr()
    assert not out.err
    assert out.out.splitlines()[-1].split()[:3] == ["all", "39", "3.7842"]


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_ranks_that_share_windows(folder: Path, pool: Callable[[int], WorkerPool], method: str) -> None:
    """15 tokens are no whole number of either method's pieces, and what makes them one does not count."""
    data = ["--data", str(folder / "a"), str(folder / "b"), "--seq-len", "15", "--by-position", "4"]
    argv = ["--load", str(folder / "drawn"), *data, "--precision", "fp64", "--json"]
    alone = json.loads(said(evaluate.main, argv))
    first, *others = pool(2).run(said, evaluate.main, [*argv, "--cp", "2", "--cp-method", method])
    assert others == [""]
    found = json.loads(first)
    for one, expected in zip([*found["sources"], found["total"]], [*alone["sources"], alone["total"]], strict=True):
        bins = zip(one.pop("by_position"), expected.pop("by_position"), strict=True)
        for row, wanted in [(one, expected), *bins]:
            assert row == wanted | {name: pytest.approx(wanted[name], rel=1e-12) for name in ("loss", "perplexity")}
    assert found["total"]["loss"] > 4, "other weights than those that know nothing"


@pytest.mark.parametrize("form", ["linear", "ntk", "yarn", "llama3"])
def test_stretched_positions_are_no_news(folder: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    argv = ["--load", str(folder / "run"), "--data", str(folder / "a"), "--seq-len", "32", "--rope-scaling", form]
    assert evaluate.main(argv) == 0
    assert not capsys.readouterr().err
    assert evaluate.main([*argv, "--rope-factor", "1.6"]) == 0
    assert f"stretched by {form} 1.6, have tokens that count 20 apart" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("--data x --task-path /x --limit 3", ["--task-path /x: token files have no tasks", "--limit 3: token files"]),
        ("--data x --tokenizer-model t --vocab-file v", ["--vocab-file v: token files hold", "--tokenizer-model t: "]),
        ("--data x --merge-file m --special-tokens-file s", ["--merge-file m: ", "--special-tokens-file s: "]),
        ("--tasks y --by-position 2 --max-tokens 9", ["--by-position 2: tasks have no windows", "--max-tokens 9: tas"]),
    ],
)
def test_a_flag_that_would_not_be_read_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: str, told: list[str]
) -> None:
    assert evaluate.main(["--load", str(folder / "run"), *argv.split()]) == 2
    said = capsys.readouterr().err
    assert [words for words in told if words not in said] == []


def test_what_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: str) -> str:
        assert evaluate.main(["--load", str(folder / "run"), *argv]) == 2
        return capsys.readouterr().err

    assert "there is nothing to evaluate on" in refused()
    assert "tasks are named as well" in refused("--data", "x", "--tasks", "y")
    assert "--batch 0: it must be positive" in refused("--data", "x", "--batch", "0")
    data = ("--data", str(folder / "a"))
    assert "--by-position 0: it must be positive" in refused(*data, "--by-position", "0")
    assert "--by-position 17: a window has 16 tokens" in refused(*data, "--by-position", "17")
    assert "--rope-factor 2.0: positions are not stretched" in refused(*data, "--rope-factor", "2")
    assert "--rope-scaling yarn: --rope-factor is 1" in refused(*data, "--rope-scaling", "yarn")
    assert "nowhere" in refused("--data", str(folder / "nowhere"))
    assert "weights and prefixes do not pair up" in refused("--data", "1", "x", "2")
    assert "it names no tokenizer" in refused("--tasks", "piqa")
    nothing = refused(*data, "--tp", "0", "--cp", "0", "--pp", "-1")
    assert [f"--{flag}: it must be positive" in nothing for flag in ("tp 0", "cp 0", "pp -1")] == [True] * 3
    assert "--tp x --cp x --pp 1 x 2 x 1: there are 1 processes, not 2; start torchrun with" in refused(
        *data, "--cp", "2"
    )
    by_heads = refused(*data, "--cp", "3", "--cp-method", "ulysses")
    assert "--cp 3: ulysses splits the 4 query heads of a tensor rank, which 3 does not divide; use 1, or" in by_heads
