"""``aquila evaluate`` through its door."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.llama import llama_tensors
from megatron_aquila.checkpoint.store import save_checkpoint
from megatron_aquila.commands import evaluate
from megatron_aquila.data.indexed import IndexedDatasetWriter
from megatron_aquila.parallel.context import ParallelContext
from tests.checkpoint.toy import SHAPE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    chunks = [
        Chunk(name, size, (0,) * len(size), torch.zeros(size)) for name, size in llama_tensors(SHAPE).items()
    ]  # every token is as likely as any other
    save_checkpoint(root / "run", 1, chunks, {"shape": asdict(SHAPE)}, ParallelContext.single())
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


def test_what_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: str) -> str:
        assert evaluate.main(["--load", str(folder / "run"), *argv]) == 2
        return capsys.readouterr().err

    assert "there is nothing to evaluate on" in refused()
    assert "tasks are named as well" in refused("--data", "x", "--tasks", "y")
    assert "--batch 0: it must be positive" in refused("--data", "x", "--batch", "0")
    assert "the model's longest sequence is 16" in refused("--data", str(folder / "a"), "--seq-len", "17")
    assert "nowhere" in refused("--data", str(folder / "nowhere"))
    assert "weights and prefixes do not pair up" in refused("--data", "1", "x", "2")
    assert "it names no tokenizer" in refused("--tasks", "piqa")
