"""The settings of the update, a section of ``config.schema``."""

# ruff: noqa: RUF009 -- setting() makes a dataclass field

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from megatron_aquila.config.fields import Count, NotNegative, Positive, Share, Whole, setting

TrainedPart = Literal["embeddings", "head", "vocabulary", "norms"]
Decay = Literal["cosine", "linear", "constant", "wsd"]
WsdDecay = Literal["linear", "cosine", "exponential", "minus_sqrt"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The update, its learning rate (all lengths are in samples), and the loss scale of fp16."""

    optimizer: Literal["adamw", "sgd"] = setting("adamw", "update rule", "--optimizer")
    train_only: TrainedPart | None = setting(
        None, "train this part alone, all else stays as it is; vocabulary: embeddings and head; default everything"
    )
    lr: Positive = setting(3e-4, "peak learning rate")
    min_lr: NotNegative = setting(3e-5, "final learning rate")
    lr_decay: Decay = setting("cosine", "shape of the decay", "--lr-decay", "--lr-decay-style")
    lr_warmup_samples: Whole = setting(0, "samples of linear warm-up from 0")
    lr_decay_samples: Count | None = setting(None, "samples until min_lr, warm-up included; default train_samples")
    lr_wsd_decay_samples: Count | None = setting(None, "samples of the final decay of wsd")
    lr_wsd_decay: WsdDecay = setting(
        "linear", "shape of the final decay of wsd", "--lr-wsd-decay", "--lr-wsd-decay-style"
    )
    beta1: Share = setting(0.9, "decay of Adam's first moment", "--beta1", "--adam-beta1")
    beta2: Share = setting(0.95, "decay of Adam's second moment", "--beta2", "--adam-beta2")
    eps: Positive = setting(1e-8, "Adam's epsilon", "--eps", "--adam-eps")
    moments_dtype: Literal["fp32", "bf16"] = setting("fp32", "type that Adam's moments are kept in between steps")
    master_weights: Literal["fp32", "remainder"] = setting(
        "fp32", "how bf16 weights' fp32 masters are kept: whole, or as the 16 bits that the weights lack"
    )
    offload_optimizer: Annotated[float, Ge(0), Le(1)] = setting(
        0.0,
        "share of masters and moments that are kept, and updated, in the host's memory instead of the GPU's",
        "--offload-optimizer",
        "--optimizer-offload-fraction",
    )
    weight_decay: NotNegative = setting(0.1, "decoupled weight decay of matrices; norms have none")
    clip_grad: NotNegative = setting(1.0, "largest global gradient norm; 0 means no clipping", "--clip-grad")
    initial_loss_scale: Positive = setting(2.0**32, "fp16: what the loss is first multiplied with for its gradients")
    min_loss_scale: Positive = setting(1.0, "fp16: the lowest loss scale")
    loss_scale_window: Count = setting(1000, "fp16: finite steps in a row after which the loss scale is doubled")
    hysteresis: Count = setting(2, "fp16: overflows, since the scale last grew, from which on each halves it")
    loss_scale: Positive | None = setting(None, "fp16: a constant loss scale instead")
