"""Does a converted folder compute what the checkpoint computes? Our engine's model against transformers' own."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_aquila.checkpoint.layout import param_chunks
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.errors import CheckpointError
from megatron_aquila.kernels.dispatch import choose_kernels
from megatron_aquila.model.aquila import AquilaStage, build_stages
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.plan.stages import plan_stages
from megatron_aquila.verify.sample import sample_batch

# Largest error over largest logit, both models in fp32: sums of a few thousand terms in another order.
LOGITS_BOUND = 1e-5
SAMPLES = 2
MAX_TOKENS = 256  # of a sample: enough to tell positions apart, few enough for a 7B on a CPU


def compare_logits(reader: CheckpointReader, folder: Path) -> str:
    """Run the checkpoint's model and the folder's on the same random tokens in fp32; a line with the error.

    Raises ``CheckpointError`` where the largest difference exceeds ``LOGITS_BOUND`` of the largest logit.
    """
    from transformers import AutoModelForCausalLM  # optional: the caller knows that it is there

    shape = reader.shape()
    batch = sample_batch(shape, range(SAMPLES), seed=0)
    tokens_BS, positions_BS = batch.tokens_BS[:, :MAX_TOKENS], batch.positions_BS[:, :MAX_TOKENS]
    ours = whole_logits(load_whole(reader, shape), shape, tokens_BS, positions_BS)
    theirs_model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs: Tensor = theirs_model.eval()(tokens_BS, position_ids=positions_BS).logits
    error = float((ours - theirs).abs().max() / ours.abs().max())
    if not error <= LOGITS_BOUND:
        raise CheckpointError(
            f"{folder}: transformers' fp32 logits differ from the checkpoint's by {error:.1e} of the largest, "
            f"more than {LOGITS_BOUND:g}; the folder is not kept"
        )
    return f"fp32 logits within {error:.1e} of the largest (bound {LOGITS_BOUND:g})"


@torch.no_grad()
def load_whole(reader: TensorReader, shape: ModelShape) -> AquilaStage:
    """The whole model of a checkpoint in this one process, in fp32 on the CPU."""
    ctx, dtype = ParallelContext.single(), torch.float32
    kernels = choose_kernels(ctx.device, dtype)
    (stage,) = build_stages(
        shape, plan_stages(shape, 1), ctx, sequence_parallel=False, kernels=kernels, dtype=dtype
    ).values()
    infos = list(stage.param_infos())
    for info in infos:
        info.param.zero_()  # padded vocabulary rows are in no file
    reader.read_into([chunk for info in infos for chunk in param_chunks(info)], cast=True)
    return stage


@torch.no_grad()
def whole_logits(stage: AquilaStage, shape: ModelShape, tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
    """logits_BSV over the real vocabulary; those at position s follow token s."""
    logits_SBV = stage.logits(None, tokens_BS, positions_BS)
    return logits_SBV.transpose(0, 1)[..., : shape.vocab_size]
