"""Hold a converted folder against the checkpoint it was made from: logits and token ids must agree, or exit 1."""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_aquila.checkpoint.layout import param_chunks
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.kernels.dispatch import choose_kernels
from megatron_aquila.model.aquila import AquilaStage, build_stages
from megatron_aquila.parallel.batch import Batch
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.plan.stages import plan_stages

LOGITS_BOUND = 1e-5  # largest error over largest logit, both in fp32: sums over a few hundred terms, in another order


def our_model(checkpoint: Path) -> tuple[ModelShape, AquilaStage]:
    """The whole model of a checkpoint on this one process, in fp32."""
    reader = CheckpointReader(checkpoint)
    shape = ModelShape(**reader.state["shape"])
    ctx = ParallelContext.single()
    kernels = choose_kernels(ctx.device, torch.float32)
    plan = plan_stages(shape, 1)
    stage = build_stages(shape, plan, ctx, sequence_parallel=False, kernels=kernels, dtype=torch.float32)[0]
    infos = list(stage.param_infos())
    for info in infos:
        info.param.data.zero_()  # padded rows of the vocabulary are in no file
    reader.read_into([chunk for info in infos for chunk in param_chunks(info)], cast=True)
    return shape, stage


def our_logits(stage: AquilaStage, tokens_BS: torch.Tensor) -> torch.Tensor:
    """logits_BSV of our model; position s of the answer follows token s."""
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    source_B = torch.zeros(tokens_BS.shape[0], dtype=torch.int64)
    batch = Batch(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS,
        loss_mask_BS=torch.ones(tokens_BS.shape),
        positions_BS=positions_BS,
        source_B=source_B,
    )
    return stage.logits(None, batch).transpose(0, 1)


@torch.no_grad()
def logits_error(checkpoint: Path, folder: Path, *, seed: int) -> float:
    """Largest difference between transformers' logits and ours over the largest of ours, on random tokens."""
    shape, stage = our_model(checkpoint)
    tokens_BS = torch.randint(shape.vocab_size, (4, shape.seq_len), generator=torch.Generator().manual_seed(seed))
    ours = our_logits(stage, tokens_BS)[..., : shape.vocab_size]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens_BS).logits
    return float((ours - theirs).abs().max() / ours.abs().max())


def differing_texts(tokenizer_json: Path, folder: Path, corpora: list[Path], *, count: int) -> int:
    """How many of the first ``count`` documents of each corpus our tokenizer and transformers' turn into other ids."""
    ours, theirs = Tokenizer.from_file(str(tokenizer_json)), AutoTokenizer.from_pretrained(folder)
    different = 0
    for path in corpora:
        with path.open(encoding="utf-8") as lines:
            for line in islice(lines, count):
                text = json.loads(line)["text"]
                plain = ours.encode(text, add_special_tokens=False).ids
                different += plain != theirs.encode(text, add_special_tokens=False)
    return different


def main() -> None:
    """Compare, print both results, fail if either differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("huggingface", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json that prepared the data")
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, help="jsonl files to encode")
    parser.add_argument("--count", type=int, default=200, help="documents of each corpus")
    options = parser.parse_args()
    error = logits_error(options.checkpoint, options.huggingface, seed=1234)
    different = differing_texts(options.tokenizer, options.huggingface, options.corpus, count=options.count)
    documents = options.count * len(options.corpus)
    print(f"logits: largest error / largest logit {error:.2e} (bound {LOGITS_BOUND:g})")
    print(f"token ids: {different} of {documents} documents differ")
    if not error <= LOGITS_BOUND or different:
        sys.exit("compare: the converted model is not the trained one")


if __name__ == "__main__":
    main()
