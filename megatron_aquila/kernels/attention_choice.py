"""Which attention is tried first on a device, and which cannot serve the run's samples at all."""

import warnings
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_aquila.kernels.self_check import Sizes

CHANGE_SCORES = ("score_blocks", "reference")
LONGEST_PLAIN = 1024  # tokens of a sample, whose scores take 128 MiB a layer with 32 heads

SDPA_BACKENDS: Mapping[str, SDPBackend] = MappingProxyType(
    {
        "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa_flash": SDPBackend.FLASH_ATTENTION,
        "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
)


RING: Mapping[str, str] = MappingProxyType(  # attention by blocks, and why it is tried; the first two on a GPU
    {
        "blocks_flash": "torch's own flash attention, block by block",
        "blocks_efficient": "block by block, it takes float32",
        "blocks": "torch's flash attention for CPUs, block by block",
        "blocks_reference": "the plain one, block by block",
    }
)


def attention_preferences(device: torch.device, sizes: Sizes) -> dict[str, str]:
    """On a GPU by what is fastest on its generation; with documents a varlen kernel goes before cuDNN's, which is none.

    From Hopper on flash attention 2 is published to take 1.7 to 2.3 times as long as cuDNN.
    """
    if sizes.alters_scores:
        return {"score_blocks": "the only one that biases and clamps scores"}
    if sizes.by_blocks:
        names = ("blocks_flash", "blocks_efficient", "blocks_reference") if device.type == "cuda" else ("blocks",)
        return {name: RING[name] for name in names}
    if device.type != "cuda":
        return {"sdpa": "torch's flash attention for CPUs"}
    generation, _ = torch.cuda.get_device_capability(device)
    cudnn = {"sdpa_cudnn": "documents one by one" if sizes.has_documents else "the fastest from Hopper on"}
    flash = {"flash_attn": "flash_attn is installed", "sdpa_flash": "torch's own flash attention"}
    if generation >= 9:
        flash = {"flash_attn_4": "flash attention 4 is installed", **flash}
    if generation == 9:
        flash = {"flash_attn_3": "flash attention 3 is installed", **flash}
    ranked = {**cudnn, **flash} if generation >= 9 and not sizes.has_documents else {**flash, **cudnn}
    return {**ranked, "sdpa_efficient": "it takes float32", "reference": "the plain one, for short samples"}


def why_attention_refused(name: str, *, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str | None:
    """Why the attention ``name`` cannot take samples of the run's length, in a line; None if it can or cannot be asked.

    The plain one holds all scores, and torch says what its backends take. Asked at the run's own shape: what is tried
    against the reference is shorter.
    """
    if sizes.alters_scores and name not in CHANGE_SCORES:
        return "it neither biases nor clamps scores, and this model does"
    by_blocks = CHANGE_SCORES[:1] if sizes.alters_scores else tuple(RING)
    if sizes.by_blocks and name not in by_blocks:
        return f"attention goes block by block here: use {'one of ' * (len(by_blocks) > 1)}{', '.join(by_blocks)}"
    if name in ("reference", "blocks_reference") and sizes.seq_len > LONGEST_PLAIN:
        return f"it holds the scores of all pairs of {sizes.seq_len} tokens"
    if name not in SDPA_BACKENDS:
        return None
    num_kv_heads = sizes.num_heads if name == "sdpa_efficient" else sizes.num_kv_heads  # it has them repeated
    q_SBND, k_SBKD = (
        torch.empty(sizes.seq_len, 1, heads, sizes.head_dim, device=device, dtype=dtype)
        for heads in (sizes.num_heads, num_kv_heads)
    )
    return _why_not_sdpa(SDPA_BACKENDS[name], q_SBND, k_SBKD)


def _why_not_sdpa(backend: SDPBackend, q_SBND: Tensor, k_SBKD: Tensor) -> str | None:
    """Why torch would not run ``backend`` on tensors like these, forward and backward, in its words; None if it would.

    ``backend`` is one of ``FUSED``. Nothing is computed.
    """
    can_use = {
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.can_use_efficient_attention,
    }[backend]
    q, k = (x.detach().requires_grad_().permute(1, 2, 0, 3) for x in (q_SBND, k_SBKD))
    asked = torch.backends.cuda.SDPAParams(q, k, k, None, 0.0, True, q_SBND.shape[2] != k_SBKD.shape[2])
    with sdpa_kernel(backend), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if can_use(asked, debug=True):
            return None
    whys = [str(warning.message).partition(" (Triggered")[0].rstrip(".") for warning in told]
    return "; ".join(" ".join(why.split()) for why in whys) or "torch does not say why"
