"""An exported folder against the checkpoint it came from: fp32 logits through transformers and through our model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_aquila.checkpoint.huggingface import HuggingFaceReader
from megatron_aquila.checkpoint.layout import param_chunks
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.errors import CheckpointError
from megatron_aquila.kernels.dispatch import choose_kernels
from megatron_aquila.kernels.self_check import Sizes
from megatron_aquila.model.aquila import build_stages
from megatron_aquila.model.position import rank_scores
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.plan.stages import plan_stages

BOUND = 1e-5  # of the largest logit: docs/numerics.md, export to Hugging Face
NUM_TEXTS, LONGEST = 2, 64


def compare_logits(reader: TensorReader, folder: Path, shape: ModelShape) -> str:
    """A line on how far transformers' fp32 logits of ``folder`` are from those of our model of ``reader``'s weights.

    Ours gets the weights rounded to the exported type. One model is in memory at a time, in fp32. Raises
    CheckpointError when the logits differ by more than ``BOUND``, or when transformers misses or ignores a tensor.
    """
    size = (NUM_TEXTS, min(shape.seq_len, LONGEST))
    tokens_BS = torch.randint(shape.vocab_size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = our_logits(reader, shape, HuggingFaceReader(folder).tensors["lm_head.weight"].dtype, tokens_BS)
        theirs = _their_logits(folder, tokens_BS)
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if not error <= BOUND:  # also when it is not a number
        raise CheckpointError(
            f"{folder}: transformers' fp32 logits differ from ours by {error:.1e} of the largest, more than {BOUND:.0e}"
        )
    return f"fp32 logits agree with transformers: largest difference {error:.1e} of the largest logit"


def our_logits(reader: TensorReader, shape: ModelShape, dtype: torch.dtype, tokens_BS: Tensor) -> Tensor:
    """Our model's fp32 logits_BSV, of the reader's weights rounded to ``dtype``. The whole model is in memory."""
    ctx = ParallelContext.single()
    kernels = choose_kernels(ctx.device, torch.float32, sizes=Sizes(scores=rank_scores(shape, ctx.tp)))
    placement = Placement(tp=ctx.tp, sequence_parallel=False, dtype=torch.float32, device=ctx.device)
    (stage,) = build_stages(shape, plan_stages(shape, 1), pp_rank=0, placement=placement, kernels=kernels).values()
    for info in stage.param_infos():
        info.param.zero_()  # padded rows are in no file
        for chunk in param_chunks(info):
            chunk.tensor.copy_(reader.read(chunk.name).to(dtype))
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    return stage.logits(None, tokens_BS, positions_BS)[..., : shape.vocab_size].transpose(0, 1)


def _their_logits(folder: Path, tokens_BS: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM  # optional: only this check needs it

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    model, loading = loaded
    lost = sorted(map(str, [*loading["missing_keys"], *loading["unexpected_keys"], *loading["mismatched_keys"]]))
    if lost:
        raise CheckpointError(f"{folder}: transformers does not load {', '.join(lost[:8])} as we wrote it")
    logits: Tensor = model(tokens_BS).logits
    return logits
