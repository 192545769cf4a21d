"""Exponents of float32 numbers, read from and written into the bits: exact where log2 is not."""

from __future__ import annotations

import torch
from torch import Tensor

EXPONENT_BIAS = 127
MANTISSA_BITS = 23
MIN_EXPONENT = -126
"""Exponent of the smallest normal float32."""
MIN_SUBNORMAL_EXPONENT = -149
MIN_NORMAL = 2.0**MIN_EXPONENT


def exponent_of(x: Tensor) -> Tensor:
    """floor(log2 |x|) of each normal float32, from its exponent field.

    Args:
        x: float32, any shape.

    Returns:
        int32; -127 for zero and subnormals, 128 for infinities and NaN.
    """
    return ((x.view(torch.int32) >> MANTISSA_BITS) & 0xFF) - EXPONENT_BIAS


def power_of_two(exponent: Tensor) -> Tensor:
    """2 ** exponent in float32, exact.

    Args:
        exponent: int32 within -149..127.
    """
    normal = (exponent + EXPONENT_BIAS) << MANTISSA_BITS
    subnormal = 1 << (exponent - MIN_SUBNORMAL_EXPONENT).clamp(0, MANTISSA_BITS - 1)
    bits = torch.where(exponent < MIN_EXPONENT, subnormal, normal)
    return bits.to(torch.int32).view(torch.float32)


def exponent_of_power(x: Tensor) -> Tensor:
    """The exponent of each power of two, subnormal ones included.

    Args:
        x: float32 powers of two.

    Returns:
        int32 within -149..127.
    """
    # frexp normalises subnormals; it puts 2**k as 0.5 * 2**(k + 1).
    return torch.frexp(x).exponent - 1


def ceil_to_power_of_two(x: Tensor) -> Tensor:
    """The smallest power of two that is not below each value, between 2**-126 and 2**127.

    Args:
        x: float64, not negative.

    Returns:
        float32.
    """
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2**exponent, 0.5 <= mantissa < 1
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    exponent = torch.where(x > 0, exponent, MIN_EXPONENT)
    found = power_of_two(exponent.clamp(MIN_EXPONENT, 127).to(torch.int32))
    return torch.where(x.isfinite(), found, torch.nan)
