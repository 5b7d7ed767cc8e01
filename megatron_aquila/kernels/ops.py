"""The ops that have kernels to choose from: their signatures, and the kernels of a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.rms_norm import Order
from megatron_aquila.kernels.scores import Scores


class RmsNorm(Protocol):
    """The signature of ``rms_norm``."""

    def __call__(self, x: Tensor, weight: Tensor, *, eps: float, order: Order) -> Tensor:
        """``x / rms(x) * weight``."""
        ...


class AddRmsNorm(Protocol):
    """The signature of ``add_rms_norm``."""

    def __call__(
        self, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, order: Order
    ) -> tuple[Tensor, Tensor]:
        """``(x + residual, its norm)``."""
        ...


class RopeQkv(Protocol):
    """The signature of ``rope_qkv_``."""

    def __call__(
        self,
        qkv_SBP: Tensor,
        cos_SBD: Tensor,
        sin_SBD: Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        interleaved: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of a projection, which may be written into; q and k turned."""
        ...


class CausalAttention(Protocol):
    """The signature of ``causal_attention``."""

    def __call__(self, q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None = None) -> Tensor:
        """``softmax(q k^T / sqrt(D)) v`` over the earlier tokens, of the same document where documents are given."""
        ...


class ScoredAttention(Protocol):
    """The signature of an attention that was chosen for scores which are changed: the others take no such keyword."""

    def __call__(
        self, q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None = None, *, scores: Scores
    ) -> Tensor:
        """``CausalAttention``, with ``scores`` done to ``q k^T / sqrt(D)``."""
        ...


class SoftmaxStatistics(Protocol):
    """The signature of ``softmax_statistics``."""

    def __call__(
        self, logits_RV: Tensor, columns_R: Tensor, is_mine_R: Tensor, *, num_real: int, with_top: bool = False
    ) -> Tensor:
        """Two or four numbers of each row, from which ranks that split the columns make a loss."""
        ...


class SoftmaxGradient(Protocol):
    """The signature of ``softmax_gradient_``."""

    def __call__(
        self,
        logits_RV: Tensor,
        columns_R: Tensor,
        is_mine_R: Tensor,
        log_sum_R: Tensor,
        weights_R: Tensor,
        *,
        num_real: int,
        top: tuple[Tensor, Tensor] | tuple[()] = (),
    ) -> None:
        """The loss's gradient in the place of the logits."""
        ...


class AdamWUpdate(Protocol):
    """The signature of ``adamw_``."""

    def __call__(
        self,
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        step: Tensor,
        factor: Tensor,
        applies: Tensor,
        publish: Tensor | None = None,
        remainder: Tensor | None = None,
    ) -> None:
        """One update in place, and its result rounded into ``publish``."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """The kernels of a run. ``reasons`` says for each op which one was chosen and why, in a line for the log."""

    rms_norm: RmsNorm
    add_rms_norm: AddRmsNorm
    rope_qkv: RopeQkv
    swiglu: Callable[[Tensor], Tensor]
    attention: CausalAttention
    softmax_statistics: SoftmaxStatistics
    softmax_gradient: SoftmaxGradient
    adamw: AdamWUpdate
    reasons: Mapping[str, str]
