"""Microscaling formats and BFP16 as tensorcast casts them.

    s = max over the block of floor(log2 |x|), minus emax;  y = round(x / 2**s to the grid) * 2**s

Exponents come from frexp, so they are exact. Source: ROCm/tensorcast c4d9b1d, its PyTorch path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import element_of

VERSION = "c4d9b1d"

EXPONENT_OF_ZERO = -23
"""Zero is taken for float32's epsilon."""
EXPONENT_OF_NO_NUMBER = -1
"""frexp of the C library gives 0 for infinities and NaN, one less than which is the exponent."""


def mx(
    x: Tensor,
    element: str = "fp8_e4m3",
    *,
    block: int = 32,
    axis: int = -1,
    rounding: str = "even",
    scalemode: str = "max",
) -> Tensor:
    """Microscaling: element formats with a power-of-two scale of any size.

    Unlike OCP MX: the scale has no limits; a zero counts as 2**-23 in the maximum, which flushes
    its block when all else is small; an infinity or NaN counts as 2**-1, so an infinity saturates
    and NaN stays alone. Along any axis but the last, values come back in the wrong places, in the
    shape of x with that axis and the last exchanged.

    Args:
        x: float32, any shape; block divides the axis.
        element: fp8_e4m3, fp8_e5m2, fp6_e3m2, fp6_e2m3, fp4_e2m1, int8, int4 or int2.
        block: elements a block.
        axis: the axis that the blocks lie along.
        rounding: even (ties to even), nearest or away (ties away from zero) or zero, which is not
            truncation but nearest with ties toward zero.
        scalemode: max, or midmax, which doubles the scale where the maximum lies past the middle
            between the largest element and the next power of two; integers ignore it.

    Returns:
        float32 of the same shape, with the exception above.

    Raises:
        ValueError: an unknown name, or a block that does not divide.
    """
    grid = element_of(element)
    if scalemode not in {"max", "midmax"}:
        raise ValueError(f"scalemode {scalemode!r} is none of max, midmax")
    if x.shape[axis] % block:
        raise ValueError(f"an axis of {x.shape[axis]} is no multiple of the block {block}")
    blocks = x.transpose(axis, -1).reshape(-1, block)
    shared = _exponent(blocks).amax(-1, keepdim=True) - grid.emax
    if scalemode == "midmax" and grid.exponent_bits:
        middle = (2.0 ** (grid.emax + 1) + grid.max) / 2
        if element == "fp8_e4m3":
            # The code after 448 is NaN: half way to it, not to 512.
            middle = (middle + grid.max) / 2
        largest = (blocks * torch.exp2(-shared)).abs().amax(-1, keepdim=True)
        shared = shared + (largest > middle).to(shared.dtype)
    scale = torch.exp2(shared)
    scaled = blocks / scale
    steps = torch.exp2(grid.mantissa_bits - _exponent(scaled).clamp(min=grid.emin))
    rounded = _round(scaled * steps, rounding) / steps
    y = rounded.clamp(-grid.max, grid.max) * scale
    # The shape is that of x before its transposition, which puts blocks of other axes astray.
    return y.reshape(x.shape).transpose(axis, -1).contiguous()


def bfp16(x: Tensor, *, axis: int = -1, rounding: str = "even") -> Tensor:
    """Block floating point of eight-bit codes: int8 in blocks of eight.

    Args:
        x: float32, any shape; 8 divides the axis.
        axis: the axis that the blocks lie along.
        rounding: as for :func:`mx`.
    """
    return mx(x, "int8", block=8, axis=axis, rounding=rounding)


def _exponent(x: Tensor) -> Tensor:
    """floor(log2 |x|) with the library's stand-ins."""
    found = torch.frexp(x).exponent - 1
    found = torch.where(x == 0, EXPONENT_OF_ZERO, found)
    return torch.where(x.isfinite(), found, EXPONENT_OF_NO_NUMBER)


def _round(x: Tensor, rounding: str) -> Tensor:
    if rounding == "even":
        return x.round()
    tie = x.abs().frac() == 0.5
    if rounding in {"nearest", "away"}:
        return torch.where(tie, (x + x.sign() * 0.5).trunc(), x.round())
    if rounding == "zero":
        return torch.where(tie, x.trunc(), x.round())
    raise ValueError(f"rounding {rounding!r} is none of even, nearest, away, zero")
