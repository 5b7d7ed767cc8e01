"""The row that one optimizer step leaves in the log."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one optimizer step did. ``loss`` is the mean over the step's tokens, in nats; ``seconds`` is wall time.

    ``grad_norm`` is that of the unscaled gradients, ``loss_scale`` what they were scaled with (1 but in fp16).
    ``source_loss`` is the mean loss of each entry of the blend that had tokens in this step. ``data_seconds`` is the
    part of ``seconds`` spent waiting for the loader. ``num_tokens`` counts the labels that entered the loss;
    ``computed_tokens`` counts every token that went through the model (what FLOPs are counted from).
    ``attention_share`` is what documents kept apart leave of attention's FLOPs: the sum of their squared lengths over
    that of the samples'.
    """

    step: int
    consumed_samples: int
    global_batch: int
    num_tokens: int
    computed_tokens: int
    loss: float
    grad_norm: float
    lr: float
    loss_scale: float
    applied: bool
    seconds: float
    data_seconds: float
    memory_bytes: int
    attention_share: float = 1.0
    source_loss: Mapping[str, float] = field(default_factory=dict)
