"""A small random Llama of transformers', as a folder, and our runner of it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_aquila.generate.generate import Continuation, generate
from megatron_aquila.generate.runner import Layout, Runner, build_runner, create_context
from megatron_aquila.generate.sampling import Sampling
from megatron_aquila.generate.source import open_source
from megatron_aquila.plan.shape import ModelShape

Change = Callable[[ModelShape], ModelShape]

VOCAB_SIZE, SEQ_LEN = 331, 64
PROMPTS = ((5, 17, 200, 3), (9,), (301, 2, 77, 4, 8, 15, 16, 23))


def save_llama(folder: Path, **changes: Any) -> Any:
    """Weights large enough that the likeliest token is not a near tie. Returns transformers' model, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": SEQ_LEN,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()
    model.save_pretrained(folder)
    return model


ALONE = Layout()


def as_it_is(shape: ModelShape) -> ModelShape:
    """Change nothing."""
    return shape


def runner_of(
    folder: Path, layout: Layout = ALONE, dtype: torch.dtype | None = None, change: Change = as_it_is
) -> Runner:
    """Ours, in this worker's world; ``change`` makes it a model of another shape."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    ctx = create_context(layout, torch.device("cpu"), world, timedelta(seconds=30))
    source = open_source(folder, tp=layout.tp)
    return build_runner(replace(source, shape=change(source.shape)), ctx, cp_method=layout.cp_method, dtype=dtype)


def words(ids: Sequence[int]) -> str:
    """A tokenizer's decode: every token is its number and a space."""
    return "".join(f"{number} " for number in ids)


def run(
    folder: Path,
    layout: Layout,
    dtype: torch.dtype | None,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    max_new_tokens: int,
) -> list[Continuation]:
    """What every rank gets."""
    return generate(runner_of(folder, layout, dtype), prompts, decode=words, how=how, max_new_tokens=max_new_tokens)
