"""Rows of new tokens are means of old ones, whatever rectangle is asked for; everything else is as it was."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.resize import ResizedReader, grown
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.errors import CheckpointError
from megatron_aquila.parallel.context import ParallelContext
from tests.checkpoint.numbers import save_checkpoint
from tests.checkpoint.toy import SHAPE, SHAPES, fill, parameters, whole_chunks

PIECES = [*((number,) for number in range(SHAPE.vocab_size)), (3, 5), (), (0, 1, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_means(dtype: torch.dtype) -> None:
    old = torch.randn(6, 4).to(dtype)
    new = grown(old, [(0,), (5,), (1, 2), ()])
    assert torch.equal(new[:2], old[[0, 5]])
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(new[2], ((old[1].to(wide) + old[2].to(wide)) / 2).to(dtype))
    assert torch.equal(new[3], old.to(wide).mean(0).to(dtype))


@pytest.fixture
def reader(tmp_path: Path) -> CheckpointReader:
    chunks = whole_chunks(parameters(0, 1, torch.float32))
    fill(chunks)
    save_checkpoint(tmp_path, 1, chunks, {"shape": asdict(SHAPE)}, ParallelContext.single())
    return CheckpointReader(tmp_path)


def test_any_rectangle_of_a_larger_model(reader: CheckpointReader) -> None:
    larger = ResizedReader(reader, PIECES)
    assert larger.shape_fields()["vocab_size"] == len(PIECES)
    for name in SHAPES:
        expected = reader.read(name)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            expected = grown(expected, PIECES)
        assert torch.equal(larger.read(name), expected)
    expected = grown(reader.read("lm_head.weight"), PIECES)
    part = Chunk("lm_head.weight", tuple(expected.shape), (40, 2), torch.empty(7, 5))
    norm = Chunk("model.norm.weight", (SHAPE.hidden_size,), (0,), torch.empty(SHAPE.hidden_size))
    larger.read_into([part, norm])
    assert torch.equal(part.tensor, expected[40:47, 2:7])
    assert torch.equal(norm.tensor, reader.read("model.norm.weight"))


def test_what_does_not_fit(reader: CheckpointReader) -> None:
    with pytest.raises(CheckpointError, match="the model has 44 tokens, the old tokenizer at least 45"):
        ResizedReader(reader, [(SHAPE.vocab_size,)])
    reader.tensors.pop("lm_head.weight")
    with pytest.raises(CheckpointError, match=r"it holds no lm_head\.weight; there is nothing to resize"):
        ResizedReader(reader, PIECES)
