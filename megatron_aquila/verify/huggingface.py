"""Weights of Llama's form against others made of them: logits of transformers' own model and of ours.

Both run with a part of their weights in memory at a time: ours a layer, transformers' a weight, from one to the next
with the activations alone. What a large model needs is what its largest weight takes in fp32.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from megatron_aquila.checkpoint.huggingface import HuggingFaceReader
from megatron_aquila.checkpoint.layout import Chunk, param_chunks
from megatron_aquila.checkpoint.llama import SpecialIds, llama_cannot_hold, llama_config
from megatron_aquila.checkpoint.reader import TensorReader
from megatron_aquila.data.tokenizer import Tokenizer
from megatron_aquila.errors import CheckpointError
from megatron_aquila.kernels.dispatch import choose_kernels
from megatron_aquila.kernels.self_check import Sizes
from megatron_aquila.model.aquila import AquilaStage, Head
from megatron_aquila.model.position import rank_scores
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.parallel.placement import Placement
from megatron_aquila.plan.shape import ModelShape, NormOrder
from megatron_aquila.plan.stages import StagePlan

BOUND = 1e-5  # of the largest logit: docs/numerics.md, export to Hugging Face
LONGEST = 32  # what a token takes grows with it, and every weight is seen with one
PROMPT: Final = (
    "The quick brown fox jumps over the lazy dog. 今天上午，我们在学校的图书馆里读书。"
    "def gcd(a, b):\n    return a if b == 0 else gcd(b, a % b)\n"
)
ROUNDED: Final = {"llama": "before", "aquila": "after"}  # when a norm's result is cast


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far logits are apart, in parts of the largest: transformers' from ours in fp32 and in bf16; and in bf16 ours
    from ours in fp32, which is what bf16 itself changes.

    ``same_next``: the part of positions whose likeliest next token is the same for both in bf16.
    """

    fp32: float
    bf16: float
    rounding: float
    same_next: float
    norm_order: NormOrder

    def __str__(self) -> str:
        return (
            f"fp32 logits agree with transformers: largest difference {self.fp32:.1e} of the largest logit; in bf16 "
            f"they differ by {self.bf16:.1e} (ours casts a norm's result {ROUNDED[self.norm_order]} its weight, "
            f"transformers' before; bf16 alone changes ours by {self.rounding:.1e}), and the likeliest next token is "
            f"the same at {self.same_next:.0%} of positions"
        )


def why_unjudged(shape: ModelShape) -> str | None:
    """What in transformers' Llama is otherwise than in the model, so that it cannot run it, or ``None``."""
    if shape.position_embedding == "rope-interleaved":
        return "rotary pairs stand half a head apart"
    return llama_cannot_hold(shape)


def compare_logits(
    ours: TensorReader,
    theirs: TensorReader,
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None = None,
) -> Agreement:
    """How far the logits of our model of the weights ``ours`` are from those of transformers' of ``theirs``.

    Both have the weights rounded to ``dtype``, the one that is written. Raises CheckpointError when the fp32 logits
    differ by more than ``BOUND``, or when transformers' model has a weight that the reader has not, in that shape.
    """
    tokens_BS = prompts(shape, tokenizer)
    with torch.no_grad():
        our_fp32 = our_logits(ours, shape, dtype, tokens_BS)
        far = _largest_difference(our_fp32, their_logits(theirs, shape, dtype, tokens_BS))
        if not far <= BOUND:  # also when it is not a number
            raise CheckpointError(
                f"{theirs.folder}: transformers' fp32 logits differ from ours of {ours.folder} by {far:.1e} of the "
                f"largest, more than {BOUND:.0e}"
            )
        ours_bf16 = our_logits(ours, shape, dtype, tokens_BS, compute=torch.bfloat16)
        theirs_bf16 = their_logits(theirs, shape, dtype, tokens_BS, compute=torch.bfloat16)
    return Agreement(
        fp32=far,
        bf16=_largest_difference(ours_bf16, theirs_bf16),
        rounding=_largest_difference(our_fp32, ours_bf16),
        same_next=(ours_bf16.argmax(-1) == theirs_bf16.argmax(-1)).double().mean().item(),
        norm_order=shape.norm_order,
    )


def prompts(shape: ModelShape, tokenizer: Tokenizer | None) -> Tensor:
    """The tokens that models are compared on, tokens_BS, always the same: random ones, and ``PROMPT`` where its
    tokenizer is known.
    """
    length = min(shape.seq_len, LONGEST)
    drawn = torch.randint(shape.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    if tokenizer is not None and tokenizer.vocab_size <= shape.vocab_size:
        (ids,) = tokenizer.encode_batch([PROMPT])
        drawn[1] = torch.tensor((ids * length)[:length])
    return drawn


def _largest_difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / ours.abs().max())


def our_logits(
    reader: TensorReader,
    shape: ModelShape,
    dtype: torch.dtype,
    tokens_BS: Tensor,
    *,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """Our model's logits_BSV, in fp32, computed in ``compute`` of the reader's weights rounded to ``dtype``: a pipeline
    of one layer a stage, one stage in memory at a time.
    """
    ctx = ParallelContext.single()
    kernels = choose_kernels(ctx.device, compute, sizes=Sizes(scores=rank_scores(shape, ctx.tp)))
    placement = Placement(tp=ctx.tp, sequence_parallel=False, dtype=compute, device=ctx.device)
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
    return x[..., : shape.vocab_size].transpose(0, 1).float()


def their_logits(
    reader: TensorReader,
    shape: ModelShape,
    dtype: torch.dtype,
    tokens_BS: Tensor,
    *,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """transformers' logits_BSV, in fp32, computed in ``compute`` of the reader's weights rounded to ``dtype``.

    The model is made without memory; a module's weights are loaded when it runs and dropped when it has. Raises
    CheckpointError where it has a weight that the reader has not, or not in that shape.
    """
    from transformers import AutoModelForCausalLM  # optional: only this check needs it

    config = _their_config(reader, shape)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # as transformers has it
    model = model.to(compute).eval()
    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    found = {name: stored.shape for name, stored in reader.tensors.items()}
    lost = sorted(name for name, size in wanted.items() if size != found.get(name))
    if lost:
        raise CheckpointError(f"{reader.folder}: transformers does not load {', '.join(lost[:8])} as we wrote it")
    # rotary tables are in no file; on the meta device they would be empty
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            _load_when_run(module, name, reader, dtype)
    logits: Tensor = model(tokens_BS, use_cache=False).logits
    return logits.float()


def _their_config(reader: TensorReader, shape: ModelShape) -> Any:
    """What a folder of Llama's form says itself; of others, Aquila2's own config.json among them, what an export would.

    Names of models that transformers does not know would need code out of the folder, which is never run.
    """
    from transformers import AutoConfig

    if isinstance(reader, HuggingFaceReader) and reader.config.get("model_type") == "llama":
        return AutoConfig.from_pretrained(reader.folder, local_files_only=True)
    said: Any = llama_config(shape, torch.float32, SpecialIds(bos=None, eos=None, pad=None))
    return AutoConfig.for_model(**said)


def _load_when_run(module: nn.Module, prefix: str, reader: TensorReader, dtype: torch.dtype) -> None:
    """Give ``module`` its own weights, those under ``prefix``, for as long as it runs."""

    def load(module: nn.Module, _inputs: object) -> None:
        module.to_empty(device="cpu", recurse=False)
        for name, weight in module.named_parameters(recurse=False):
            shape = reader.tensors[f"{prefix}.{name}"].shape
            _fill(reader, Chunk(f"{prefix}.{name}", shape, (0,) * len(shape), weight.detach()), dtype)

    def drop(module: nn.Module, _inputs: object, _output: object) -> None:
        module.to_empty(device="meta", recurse=False)

    module.register_forward_pre_hook(load)
    module.register_forward_hook(drop)


def _fill(reader: TensorReader, chunk: Chunk, dtype: torch.dtype) -> None:
    """A whole tensor of the reader's, rounded to ``dtype`` and then to the chunk's type. Only rounding takes memory."""
    if reader.tensors[chunk.name].dtype == dtype:
        reader.read_into([chunk], cast=True)
    else:
        chunk.tensor.copy_(reader.read(chunk.name, dtype))
