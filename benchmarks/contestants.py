"""Training steps of the same model, ours and transformers', as functions that take one step."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.common import Run
from megatron_aquila.config.derive import derive
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.data.indexed import IndexedDataset
from megatron_aquila.data.loader import BatchLoader
from megatron_aquila.data.samples import Sample, SampleSource, Span
from megatron_aquila.observe.report import StepReport
from megatron_aquila.parallel.params import Constant
from megatron_aquila.plan.shape import ModelShape
from megatron_aquila.train.build import DTYPES, Machine, build_machine, create_context, host_batch
from megatron_aquila.train.corpus import Corpus
from megatron_aquila.train.loss import LossMeans
from megatron_aquila.train.record import RunRecord
from megatron_aquila.train.start import fresh_state
from megatron_aquila.train.state import TrainState
from megatron_aquila.train.stragglers import Comparison
from megatron_aquila.train.trainer import Reporter, Steps

Weights = Literal["same", "masters"]
CAUSAL = "sdpa_causal"  # transformers' attention under a name of ours


@dataclass(frozen=True, slots=True)
class RandomTokens:
    """A ``SampleSource`` without end: sample i is a function of i and comes from no data set."""

    vocab_size: int
    seq_len: int
    names: tuple[str, ...] = ("random tokens",)
    datasets: tuple[IndexedDataset, ...] = ()

    def spans(self, index: int) -> list[Span]:
        """None."""
        return []

    def samples_with(self, source: int, sequence: int) -> NDArray[np.int64]:
        """None."""
        return np.empty(0, np.int64)

    def taken(self, stop: int) -> NDArray[np.int64]:
        """Each comes from the one name."""
        return np.array([stop])

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> Sample:
        tokens = np.random.default_rng(index).integers(self.vocab_size, size=self.seq_len + 1)
        return Sample(tokens, 0)

    def describe(self) -> str:
        """A line for people."""
        return "random tokens, without end"


class Silent:
    """A reporter that writes nothing: a log's line costs what its writer costs."""

    def step(self, report: StepReport) -> None:
        """Nothing."""

    def validation(self, state: TrainState, means: LossMeans) -> None:
        """Nothing."""

    def stall(self, state: TrainState, seconds: float) -> None:
        """Nothing."""

    def stragglers(self, state: TrainState, found: Comparison) -> None:
        """Nothing."""

    def note(self, text: str | None) -> None:
        """Nothing."""

    def record(self, event: str, **fields: Any) -> None:
        """Nothing."""


class OurStep:
    """The whole of a run's step on one process: data read ahead, forward, backward, clip, update, report.

    ``machine`` holds the weights, which are random, and the last step's gradients. ``source``: default random tokens.
    """

    def __init__(self, config: RunConfig, device: torch.device, source: SampleSource | None = None) -> None:
        derived = derive(config, 1)
        self.machine = build_machine(config, derived, create_context(config, derived, device))
        fill_(self.machine)
        loader = BatchLoader(
            RandomTokens(derived.shape.vocab_size, derived.shape.seq_len) if source is None else source,
            share=derived.batches.share_of(0),
            vocab_size=derived.shape.vocab_size,
            prepare=partial(host_batch, pinned=device.type == "cuda"),
            batch_at=derived.batches.global_batch_at,
            prefetch=config.data.prefetch,
        )
        self._corpus = Corpus(train=loader, valid=(), course="", identity=None)
        self._state = fresh_state(config, derived)
        self._take = self.telling(Silent())

    def __call__(self) -> None:
        """One step, of which nobody is told."""
        self._take()

    def telling(self, reporter: Reporter, machine: Machine | None = None) -> Run:
        """A step that tells ``reporter``, as a function; ``machine``: by another one with the same weights."""
        record = RunRecord(reporter, self._corpus.train.source)
        steps = Steps(self.machine if machine is None else machine, self._corpus, reporter, record)

        def take() -> None:
            taken = steps.take(self._state, stop_requested=False)
            assert taken is not None, "nobody asked to stop"
            self._state = taken.state

        return take

    def update(self) -> None:
        """Clip and update once more, by the gradients that are there."""
        optim = self.machine.config.optim
        self.machine.optimizer.step(optim.lr, self.machine.optimizer.clip(optim.clip_grad))


@torch.no_grad()
def fill_(machine: Machine) -> None:
    """Random weights, drawn on the device: the run's own, which depend on no layout, take minutes for a large model."""
    for info in machine.infos:
        if isinstance(info.init, Constant):
            info.param.fill_(info.init.value)
        else:
            info.param.normal_(std=info.init.std)
    machine.optimizer.refresh_masters()


def llama(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' LlamaForCausalLM of the same sizes. Its attention is torch's, causal by a flag without a mask."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # For "sdpa" transformers builds a mask where it is compiled by a torch before 2.14, and a mask keeps the flash
    # kernels and grouped heads away. For a name without a mask function there is none.
    AttentionInterface.register(CAUSAL, sdpa_attention_forward)
    settings: dict[str, Any] = {"attn_implementation": CAUSAL}  # unknown to the types of LlamaConfig
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.seq_len,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_base},
        initializer_range=shape.init_std,
        tie_word_embeddings=False,
        use_cache=False,
        **settings,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.train()


def transformers_step(
    config: RunConfig, device: torch.device, *, weights: Weights, is_compiled: bool, checkpointing: bool
) -> Run:
    """A step as a careful user writes it: fused AdamW, clipping without waiting for the device, batches there already.

    ``weights`` "same": weights and moments in the run's type, 8 bytes a parameter in bf16, which loses small updates;
    "masters": fp32 weights and moments under autocast, as exact as ours, 16 bytes.
    """
    shape, dtype = derive(config, 1).shape, DTYPES[config.train.precision]
    model = llama(shape, torch.float32 if weights == "masters" else dtype, device)
    if checkpointing:
        model.gradient_checkpointing_enable()
    optim, train = config.optim, config.train
    decayed = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": optim.weight_decay}]
    others = [{"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(
        decayed + others, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
    )
    microbatches = train.global_batch // train.micro_batch
    size = (microbatches, train.micro_batch, shape.seq_len)
    batches = torch.randint(shape.vocab_size, size, device=device)
    forward = torch.compile(model) if is_compiled else model
    autocast = torch.autocast(device.type, dtype, enabled=weights == "masters" and dtype != torch.float32)

    def step() -> None:
        for tokens_BS in batches:
            with autocast:
                loss = forward(input_ids=tokens_BS, labels=tokens_BS).loss / microbatches
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        adamw.step()
        adamw.zero_grad()

    return step
