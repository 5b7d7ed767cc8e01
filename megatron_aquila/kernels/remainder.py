"""A float32 number as a bfloat16 weight and the 16 bits that the weight lacks: a master without a copy of its own.

As integers, ``master = (weight << 16) + remainder`` with a signed remainder. The weight is the bfloat16 that is nearest
to the master; half-way between two, the one farther from 0, where a cast takes the even one: both neighbours of an even
weight would need 2^16 + 1 remainders. That is one master in 2^17, and no master loses a bit.
"""

import torch
from torch import Tensor


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 weight and the int16 remainder of a float32 ``master`` that is a number or infinite."""
    bits = master.view(torch.int32)
    remainder = bits.to(torch.int16)  # the lower half, signed
    weight = ((bits - remainder) >> 16).to(torch.int16).view(torch.bfloat16)
    return weight, remainder


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master; the inverse of ``split``."""
    bits = (weight.view(torch.int16).to(torch.int32) << 16) + remainder
    return bits.view(torch.float32)
