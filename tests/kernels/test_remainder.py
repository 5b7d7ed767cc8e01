"""Split and join are each other's inverse; the weight is the nearest bfloat16, as integers decide independently."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_aquila.kernels.remainder import join, split

CORNERS = [
    0x00000000, 0x80000000,  # both zeros
    0x00000001, 0x80000001, 0x007FFFFF,  # subnormal
    0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000, 0x00008000, 0x80008000,  # half-way between two weights
    0x3F807FFF, 0x3F808001, 0x3F80FFFF,
    0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F8000,  # rounded to infinity
    0x7F800000, 0xFF800000,
]  # fmt: skip


def from_bits(bits: list[int]) -> Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def bits_of(x: Tensor) -> list[int]:
    return [value & 0xFFFFFFFF for value in x.view(torch.int32).tolist()]


patterns = st.integers(0, 2**32 - 1).filter(lambda bits: bits & 0x7FFFFFFF <= 0x7F800000)


@given(bits=st.lists(patterns, min_size=1, max_size=50))
def test_no_bit_is_lost(bits: list[int]) -> None:
    bits += CORNERS
    weight, remainder = split(from_bits(bits))
    assert (weight.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    assert bits_of(join(weight, remainder)) == bits


@given(bits=st.lists(patterns, min_size=1, max_size=50))
def test_the_weight_is_the_nearest_and_away_from_zero_half_way(bits: list[int]) -> None:
    """Independently: add half and cut off, on the magnitude. It is what a cast gives but half-way."""
    bits += CORNERS
    weight, _ = split(from_bits(bits))
    cast = from_bits(bits).bfloat16()
    for pattern, found, other in zip(bits, bits_of(weight.float()), bits_of(cast.float()), strict=True):
        magnitude = ((pattern & 0x7FFFFFFF) + 0x8000) & 0x7FFF0000
        assert found == (pattern & 0x80000000) | magnitude
        assert (found == other) or pattern & 0xFFFF == 0x8000


@given(weight=st.integers(0, 2**16 - 1), remainder=st.integers(-(2**15), 2**15 - 1))
def test_every_pair_that_is_a_number_is_split_back(weight: int, remainder: int) -> None:
    """Not -0.0 with a negative remainder: below the smallest negative number lie those that are none."""
    pair = torch.tensor([weight]).to(torch.int16).view(torch.bfloat16), torch.tensor([remainder], dtype=torch.int16)
    (bits,) = bits_of(join(*pair))
    if bits & 0x7FFFFFFF <= 0x7F800000:
        found = split(from_bits([bits]))
        assert [half.view(torch.int16).item() for half in found] == [half.view(torch.int16).item() for half in pair]


@pytest.mark.parametrize("value", [1.0, -3.14159, 1e-40])
def test_a_truncated_weight_would_show(value: float) -> None:
    """Mutant: the upper half alone, with an unsigned remainder, is not the nearest weight."""
    masters = value * (1 + torch.rand(1000, generator=torch.Generator().manual_seed(0)))
    cut = (masters.view(torch.int32) & -65536).view(torch.float32).bfloat16()
    assert (cut != masters.bfloat16()).any()
    assert torch.equal(split(masters)[0], masters.bfloat16())
