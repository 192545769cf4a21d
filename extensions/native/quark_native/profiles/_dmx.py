"""The arithmetic on bits beneath d-Matrix's formats.

Source: dmx-compressor 69a2245, its C++ extension on CPU and the Python around it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quark_native.formats.bits import MANTISSA_BITS

EXPONENT_MASK = 0xFF << MANTISSA_BITS
MAX_BFP_PRECISION = 22
"""The library admits more, but then shifts by a negative number of bits."""
NO_EXPONENT = -200
"""Stands for the exponent of zero in the asymmetric rule."""
INT_OF_NAN = -(2.0**31)
"""What x86-64 converts NaN to."""


def first_bits(mantissa: int) -> int:
    """The mantissa field of float32 with its first bits set."""
    return (1 << MANTISSA_BITS) - (1 << MANTISSA_BITS - mantissa)


def round_bits(x: Tensor, stored: int, rounding: str) -> Tensor:
    """Rounds magnitudes to a number of stored mantissa bits, on the bits; subnormals likewise."""
    bits = x.contiguous().view(torch.int32)
    dropped = MANTISSA_BITS - stored
    unit = 1 << dropped
    if rounding == "nearest":
        tie_below_even = (bits & 2 * unit - 1) == unit // 2
        added = torch.where(tie_below_even, 0, unit // 2).to(torch.int32)
        bits = bits + added
    elif rounding == "up":
        bits = bits + unit
    elif rounding != "down":
        raise ValueError(f"rounding {rounding!r} is none of nearest, down, up")
    return (bits & -unit).view(torch.float32)


def round_on_base(x: Tensor, maximum: Tensor, precision: int, rounding: str) -> Tensor:
    """The block rule: x rides on a base whose last kept bit is the quantum."""
    if not 2 <= precision <= MAX_BFP_PRECISION:
        raise ValueError(f"precision {precision} is not within 2..{MAX_BFP_PRECISION}")
    top = maximum.contiguous().view(torch.int32) & EXPONENT_MASK
    base = top.view(torch.float32) * 6
    y = round_bits(x + base, precision, rounding) - base
    over = (y.view(torch.int32) & EXPONENT_MASK) > top
    limit = (top | first_bits(precision - 2)).view(torch.float32)
    # An overflowed base leaves NaN: of inf - inf, negative on x86-64, or under "up" one step above
    # inf, which is a positive NaN. Its sign becomes the limit's.
    sign_of_nan = 1.0 if rounding == "up" else -1.0
    return torch.where(over, limit.copysign(torch.where(y.isnan(), sign_of_nan, y)), y)


def make_asymmetric(y: Tensor, x: Tensor, precision: int) -> Tensor:
    """Moves codes -(2**(p - 1) - 1) one down where the error does not grow.

    Args:
        y: quantized blocks, [..., blocks, block].
        x: what they were.
        precision: mantissa bits with the sign.
    """
    mantissa, exponent = torch.frexp(y)
    exponent = torch.where(y == 0, NO_EXPONENT, torch.where(y.isnan(), 0, exponent))
    unit_exponent = exponent.amax(-1, keepdim=True) - precision + 1
    codes = mantissa * torch.pow(2.0, exponent - unit_exponent)
    codes = torch.where(codes.isnan(), INT_OF_NAN, codes).int()
    edge = codes == 1 - 2 ** (precision - 1)
    error = y - x
    moved = error - torch.pow(2.0, unit_exponent)
    codes = codes - (edge & (moved.abs() <= error.abs())).int()
    # The library works on one block of every row at a time, and leaves it alone without an edge.
    rows = tuple(range(edge.dim() - 2))
    touched = edge.any(-1, keepdim=True)
    if rows:
        touched = touched.any(rows, keepdim=True)
    return torch.where(touched, torch.ldexp(codes, unit_exponent), y)
