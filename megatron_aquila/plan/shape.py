"""The resolved shape of a model: what the network, the FLOP count, the memory plan and the converters take."""

import math
from dataclasses import dataclass
from typing import Literal

NormOrder = Literal["aquila", "llama"]
RopeScaling = Literal["none", "linear", "ntk", "yarn", "llama3", "two-range"]
# yarn and llama3 treat feature pairs by their turns within a trained length; two-range leaves shorter distances alone
NEEDS_TRAINED_LEN = ("yarn", "llama3", "two-range")
PositionEmbedding = Literal["rope", "rope-interleaved", "alibi"]
Precision = Literal["bf16", "fp16", "fp32", "fp64", "fp8"]  # fp8: of the linears' products, the rest is bf16


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes and constants of an Aquila model. Nothing here is optional and nothing depends on the layout.

    ``vocab_size`` rows are real; rows up to ``padded_vocab_size`` exist only so that shards are equal: they take no
    part in the softmax, get no gradient and are in no file. ``norm_order`` says where RMSNorm casts: Aquila multiplies
    the weight in fp32 and casts once, Llama casts first.

    ``rope_scaling`` stretches rotary positions ``rope_factor`` times beyond ``rope_trained_len``, the longest that the
    weights knew before (``NEEDS_TRAINED_LEN``). ``position_embedding``: rotary pairs (i, i + D/2) or, interleaved,
    (2i, 2i + 1); or none, and scores that sink with distance. ``score_clamp`` holds attention's scaled scores.
    ``norm_head``: the head's rows have length 1 as they are used. ``max_z_loss`` times the square of a token's largest
    logit is added to its loss in training.
    """

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int
    seq_len: int
    norm_eps: float = 1e-5
    norm_init: float = 1.0
    norm_order: NormOrder = "aquila"
    init_std: float = 0.02
    rope_base: float = 10000.0
    rope_scaling: RopeScaling = "none"
    rope_factor: float = 1.0
    rope_trained_len: int = 1
    position_embedding: PositionEmbedding = "rope"
    score_clamp: float | None = None
    norm_head: bool = False
    max_z_loss: float = 0.0

    @property
    def stretched_rope_base(self) -> float:
        """The base that rotary frequencies have: ntk's is larger by ``factor^(D / (D - 2))``, so that the fastest pair
        stays and the slowest is interpolated (bloc97 2023, "NTK-aware scaled RoPE").
        """
        if self.rope_scaling != "ntk":
            return self.rope_base
        return float(self.rope_base * self.rope_factor ** (self.head_dim / (self.head_dim - 2)))

    @property
    def longest_reach(self) -> float:
        """How far apart the first and the last token of a sample count, in the positions of unstretched frequencies."""
        exact = min(self.rope_trained_len, self.seq_len) if self.rope_scaling == "two-range" else 0
        return exact + (self.seq_len - exact) / self.rope_factor

    @property
    def attention_size(self) -> int:
        """Width of the concatenated heads: ``num_heads * head_dim``."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the concatenated key (or value) heads: ``num_kv_heads * head_dim``."""
        return self.num_kv_heads * self.head_dim


def ffn_size(hidden_size: int, multiple_of: int, multiplier: float | None = None) -> int:
    """Llama's width of the gated MLP: 2/3 of ``4 * hidden_size``, times ``multiplier``, rounded up to ``multiple_of``.

    Aquila2-7B: ``ffn_size(4096, 256) == 11008``; Aquila2-34B: ``ffn_size(6144, 4096, 1.3) == 24576``.
    """
    size = int(4 * hidden_size * 2 / 3)
    if multiplier is not None:
        size = int(size * multiplier)
    return multiple_of * math.ceil(size / multiple_of)


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """``vocab_size`` rounded up to ``multiple``. Unlike Megatron-LM's, it does not depend on the tensor degree."""
    return multiple * math.ceil(vocab_size / multiple)
