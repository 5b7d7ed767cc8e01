"""The row that one optimizer step leaves in the log."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one optimizer step did. ``loss`` is the mean over the step's tokens, in nats.

    ``seconds`` is wall time of the device: on a CPU from the step's beginning to its end; on a GPU, to which the host
    hands out steps ahead of time, from where its stream comes to the step to where it leaves it. What it waits for in
    between counts (data, other ranks, a host that is late), and what happens between steps does not.
    ``data_seconds`` is how long the host waited for the loader: on a CPU a part of ``seconds``, on a GPU often hidden
    behind the step before.

    ``grad_norm`` is that of the unscaled gradients, ``loss_scale`` what they were scaled with (1 but in fp16).
    ``z_loss`` is what the max-z loss added to ``loss`` where it was differentiated, if the model has one.
    ``source_loss`` is the mean loss of each entry of the blend that had tokens in this step. ``num_tokens`` counts the
    labels that entered the loss; ``computed_tokens`` counts every token that went through the model (what FLOPs are
    counted from). ``attention_share`` is what documents kept apart leave of attention's FLOPs: the sum of their squared
    lengths over that of the samples'.
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
    z_loss: float | None = None
    source_loss: Mapping[str, float] = field(default_factory=dict)
