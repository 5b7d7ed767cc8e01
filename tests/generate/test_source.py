"""Weights of any known form are used as they lie: the likeliest next token is that of the network they are of."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_aquila.errors import CheckpointError
from megatron_aquila.generate.runner import Layout
from megatron_aquila.generate.sampling import Sampling
from megatron_aquila.generate.source import open_source
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.verify.pool import WorkerPool
from tests.checkpoint.megatron_files import write_files
from tests.checkpoint.plain_networks import (
    AQUILA,
    BAICHUAN,
    TOKENS,
    aquila_files,
    aquila_logits,
    baichuan_files,
    baichuan_logits,
    folder_of,
)
from tests.generate.models import run
from tests.verify.families import llama_weights

FORMS = {
    "Baichuan2-13B": (BAICHUAN | {"position_embedding": "alibi"}, "bin", partial(baichuan_logits, alibi=True)),
    "Baichuan2-7B": (BAICHUAN, "safetensors", partial(baichuan_logits, alibi=False)),
    "Aquila 2023": (AQUILA, "module", aquila_logits),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_next_token_on_two_ranks(form: str, tmp_path: Path, pool: Callable[[int], WorkerPool]) -> None:
    config, how, judge = FORMS[form]
    files = aquila_files() if form.startswith("Aquila") else baichuan_files()
    expected = judge(files)[:, -1].argmax(-1).tolist()
    folder_of(tmp_path, config, files, how)
    for ours in pool(2).run(run, tmp_path, Layout(tp=2), None, TOKENS.tolist(), Sampling(temperature=0), 1):
        assert [found.tokens[0] for found in ours] == expected


def test_megatrons_files_and_what_is_none(tmp_path: Path) -> None:
    shape = ModelShape(
        num_layers=2, hidden_size=24, ffn_size=20, num_heads=6, num_kv_heads=2, head_dim=4, vocab_size=29,
        padded_vocab_size=128, seq_len=16,
    )  # fmt: skip
    weights = llama_weights(shape)
    source = open_source(write_files(tmp_path / "theirs", weights, shape, tp=2, pp=2, rows=32), tp=3)
    assert source.shape.padded_vocab_size == 384, "a multiple of 128 and of tp"
    assert source.dtype == torch.float32
    with pytest.raises(CheckpointError, match=r"holds no manifest\.json or latest"):
        open_source(tmp_path, tp=1)
