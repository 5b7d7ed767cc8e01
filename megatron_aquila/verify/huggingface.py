"""An exported folder against the checkpoint it came from: fp32 logits through transformers and through our model.

Both run with a part of their weights in memory at a time: ours a layer, transformers' a weight, from one to the next
with the activations alone. What a large model needs is what its largest weight takes in fp32.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_aquila.checkpoint.huggingface import HuggingFaceReader
from megatron_aquila.checkpoint.layout import Chunk, param_chunks
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.errors import CheckpointError
from megatron_aquila.kernels.dispatch import choose_kernels
from megatron_aquila.kernels.self_check import Sizes
from megatron_aquila.model.aquila import AquilaStage, Head
from megatron_aquila.model.position import rank_scores
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.plan.stages import StagePlan

BOUND = 1e-5  # of the largest logit: docs/numerics.md, export to Hugging Face
NUM_TEXTS, LONGEST = 2, 64


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far transformers' logits are from ours in fp32, in parts of the largest: in fp32, and computed in bf16.

    ``same_next``: the part of positions whose likeliest next token bf16 leaves as it is.
    """

    fp32: float
    bf16: float
    same_next: float

    def __str__(self) -> str:
        return (
            f"fp32 logits agree with transformers: largest difference {self.fp32:.1e} of the largest logit; in bf16 "
            f"transformers' differ from them by {self.bf16:.1e}, the likeliest next token is the same at "
            f"{self.same_next:.0%} of positions"
        )


def compare_logits(reader: TensorReader, folder: Path, shape: ModelShape) -> Agreement:
    """How far transformers' logits of ``folder`` are from the fp32 logits of our model of ``reader``'s weights.

    Ours gets the weights rounded to the exported type. The texts are random tokens, always the same. Raises
    CheckpointError when the fp32 logits differ by more than ``BOUND``, or when transformers misses or ignores a tensor.
    """
    size = (NUM_TEXTS, min(shape.seq_len, LONGEST))
    tokens_BS = torch.randint(shape.vocab_size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = our_logits(reader, shape, HuggingFaceReader(folder).tensors["lm_head.weight"].dtype, tokens_BS)
        far = _largest_difference(ours, their_logits(folder, tokens_BS, torch.float32))
        if not far <= BOUND:  # also when it is not a number
            raise CheckpointError(
                f"{folder}: transformers' fp32 logits differ from ours by {far:.1e} of the largest, more than "
                f"{BOUND:.0e}"
            )
        rounded = their_logits(folder, tokens_BS, torch.bfloat16)
    same = (rounded.argmax(-1) == ours.argmax(-1)).double().mean().item()
    return Agreement(far, _largest_difference(ours, rounded), same)


def _largest_difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / ours.abs().max())


def our_logits(reader: TensorReader, shape: ModelShape, dtype: torch.dtype, tokens_BS: Tensor) -> Tensor:
    """Our model's fp32 logits_BSV, of the reader's weights rounded to ``dtype``: a pipeline of one layer a stage, one
    stage in memory at a time.
    """
    ctx = ParallelContext.single()
    kernels = choose_kernels(ctx.device, torch.float32, sizes=Sizes(scores=rank_scores(shape, ctx.tp)))
    placement = Placement(tp=ctx.tp, sequence_parallel=False, dtype=torch.float32, device=ctx.device)
    layers = (range(0), *(range(number, number + 1) for number in range(shape.num_layers)), range(0))
    plan = StagePlan(layers, stage_rank=(0,) * len(layers))
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    x: Tensor | None = None
    for number in range(plan.num_stages):
        stage = AquilaStage(shape, plan, number, placement=placement, kernels=kernels)
        for info in stage.param_infos():
            info.param.zero_()  # padded rows are in no file
            for chunk in param_chunks(info):
                _fill(reader, chunk, dtype)
        x = stage.infer(x, tokens_BS, positions_BS, ending=Head.logits)
        del stage, info, chunk  # before the next one is made
    assert x is not None, "the last stage gives logits"
    return x[..., : shape.vocab_size].transpose(0, 1)


def their_logits(folder: Path, tokens_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """transformers' logits_BSV of the model in ``folder``, in float32, computed in ``dtype``.

    The model is made without memory; a module's weights are loaded when it runs and dropped when it has. Raises
    CheckpointError where it has a weight that is not in the files, of another shape there, or lacks one that is.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # optional: only this check needs it

    reader = HuggingFaceReader(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # as transformers has it
    model = model.to(dtype).eval()
    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    found = {name: stored.shape for name, stored in reader.tensors.items()}
    lost = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if lost:
        raise CheckpointError(f"{folder}: transformers does not load {', '.join(lost[:8])} as we wrote it")
    # rotary tables are in no file; on the meta device they would be empty
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            _load_when_run(module, name, reader)
    logits: Tensor = model(tokens_BS, use_cache=False).logits
    return logits.float()


def _load_when_run(module: nn.Module, prefix: str, reader: TensorReader) -> None:
    """Give ``module`` its own weights, those under ``prefix``, for as long as it runs."""

    def load(module: nn.Module, _inputs: object) -> None:
        module.to_empty(device="cpu", recurse=False)
        for name, weight in module.named_parameters(recurse=False):
            stored = reader.tensors[f"{prefix}.{name}"]
            whole = Chunk(f"{prefix}.{name}", stored.shape, (0,) * len(stored.shape), weight.detach())
            reader.read_into([whole], cast=True)

    def drop(module: nn.Module, _inputs: object, _output: object) -> None:
        module.to_empty(device="meta", recurse=False)

    module.register_forward_pre_hook(load)
    module.register_forward_hook(drop)


def _fill(reader: TensorReader, chunk: Chunk, dtype: torch.dtype) -> None:
    """A whole tensor of the reader's, rounded to ``dtype``, into one of a wider type. Only rounding takes memory."""
    if reader.tensors[chunk.name].dtype == dtype:
        reader.read_into([chunk], cast=True)
    else:
        chunk.tensor.copy_(reader.read(chunk.name, dtype))
