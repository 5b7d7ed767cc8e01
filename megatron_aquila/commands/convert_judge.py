"""What transformers says of converted weights, before they get their name."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_aquila.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from megatron_aquila.checkpoint.reader import TensorReader
    from megatron_aquila.data.tokenizer import Tokenizer
    from megatron_aquila.plan.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Case:
    """The weights that our model runs with and those that transformers' does: one side is what was read, the other what
    was written, rounded to ``dtype``.

    ``published``: the folder whose tokenizer transformers is to read, which has a temporary name still; None where none
    is published. ``source``: where a publisher's files of the tokenizer are from.
    """

    ours: "TensorReader"
    theirs: "TensorReader"
    shape: "ModelShape"
    dtype: "torch.dtype"
    tokenizer: "Tokenizer | None"
    published: Path | None
    source: Path | None = None


Judge = Callable[[Case], str]  # a line on how well they agree; raises AquilaError when they do not


def need_transformers() -> None:
    """Raise CheckpointError where transformers is not installed."""
    if find_spec("transformers") is None:
        raise CheckpointError(
            "the weights cannot be verified: transformers is not installed; pip install 'megatron_aquila[hf]', or give "
            "--no-verify"
        )


def judge_in_transformers(case: Case) -> str:
    """Token ids must be equal and fp32 logits as near as rounding allows; a line on both.

    Raises CheckpointError or DataError when they differ.
    """
    from megatron_aquila.commands.convert_tokenizer import compare_ids
    from megatron_aquila.verify.huggingface import compare_logits

    logits = str(compare_logits(case.ours, case.theirs, case.shape, dtype=case.dtype, tokenizer=case.tokenizer))
    if case.tokenizer is None or case.published is None:
        return logits
    ids = compare_ids(case.tokenizer, case.published, case.shape.vocab_size, source=case.source)
    return f"{ids}, {logits}"
