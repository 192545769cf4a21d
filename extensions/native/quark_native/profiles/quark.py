"""Microscaling, BFP16 and shared microexponents as AMD Quark computes them.

    MX:    s = f(log2 M) - emax, y = RNE(x / 2**s to the element's grid) * 2**s
    BFP16: s = floor(log2 M) - 6, y = RNE(x / 2**s) * 2**s; s + 1 if a code passes -128..127
    MX6/9: s = E - shift - bits + 2, y = RNE(x / 2**s) * 2**s, shift = 1 where a pair of elements
           lies below the block's exponent E

M is the block's largest magnitude; f is floor, ceil, or floor after rounding M to the element's
precision (even). Source: amd_quark 0.13, eager mode and its C++ element kernel on CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quark_native.formats.bits import MANTISSA_BITS, MIN_NORMAL, exponent_of

from ._common import (
    ELEMENTS,
    MAX_E8M0_EXPONENT,
    MIN_E8M0_EXPONENT,
    block_max,
    blockwise,
    element_of,
    round_to_grid,
)

VERSION = "0.13"

SCALE_OF_ZERO = 2.0**-23
"""float32's epsilon, in place of a scale that is zero."""
INT8_CODES = 127
INT8_FRACTION = 64
INT8_PRECISION = 8
"""Bits to which even rounding takes the maximum of int8 blocks: its width, not its mantissa."""
BFP16_BLOCK = 8
MICROEXPONENT_BLOCK = 16
MICROEXPONENT_PAIR = 2
MICROEXPONENT_BITS = {"mx6": 5, "mx9": 8}


def mx(
    x: Tensor,
    element: str = "fp8_e4m3",
    *,
    block: int = 32,
    axis: int = -1,
    scaling: str = "even",
) -> Tensor:
    """Microscaling formats.

    Unlike OCP MX: floor and ceil take a float32 log2, wrong next to powers of two, and have no
    limits of the scale but that zero becomes 2**-23; an infinity makes its block NaN. Under even
    scaling an infinity stays (int8: saturates) and its block's others become zero; a maximum that
    rounds to 2**128 has the scale 2**127.

    Args:
        x: float32, any shape with at least one dimension.
        element: fp8_e4m3, fp8_e5m2, fp6_e3m2, fp6_e2m3, fp4_e2m1 or int8.
        block: elements a block.
        axis: the axis that the blocks lie along.
        scaling: even, floor or ceil.

    Returns:
        float32 of the same shape.

    Raises:
        ValueError: an unknown name.
    """
    grid = element_of(element, without=("int4", "int2"))
    precision = grid.mantissa_bits if grid.exponent_bits else INT8_PRECISION

    def quantize(blocks: Tensor) -> Tensor:
        maximum = block_max(blocks)
        if scaling == "even":
            scale = _even_scale(maximum, precision, grid.emax)
        elif scaling == "floor":
            scale = 2 ** (maximum.log2().floor() - grid.emax)
        elif scaling == "ceil":
            scale = 2 ** (maximum.log2().ceil() - grid.emax)
        else:
            raise ValueError(f"scaling {scaling!r} is none of even, floor, ceil")
        scale = torch.where(scale == 0, SCALE_OF_ZERO, scale)
        if element == "int8":
            return _integers(blocks, scale / INT8_FRACTION, -INT8_CODES, INT8_CODES)
        scaled = blocks / scale
        rounded = round_to_grid(scaled, grid)
        if grid.bits < ELEMENTS["fp8_e4m3"].bits:
            # The element kernel passes infinities on; the casts to fp8 come after a clamp.
            rounded = torch.where(scaled.isinf(), scaled, rounded)
        return rounded * scale

    return blockwise(quantize, x, block=block, axis=axis)


def bfp16(x: Tensor, *, axis: int = -1) -> Tensor:
    """Block floating point: eight-bit codes in blocks of eight, -128 allowed.

    A block doubles its scale, and coarsens all its elements, when a code rounds to 128; a code of
    -128 does not. Infinities and NaN become zero.

    Args:
        x: float32, any shape with at least one dimension.
        axis: the axis that the blocks lie along.

    Returns:
        float32 of the same shape.
    """

    def scale_of(maximum: Tensor) -> Tensor:
        scale = 2 ** (maximum.log2().floor() - 6)
        return torch.where(scale == 0, SCALE_OF_ZERO, scale)

    def quantize(blocks: Tensor) -> Tensor:
        blocks = torch.where(blocks.isfinite(), blocks, 0.0)
        maximum = block_max(blocks)
        scale = scale_of(maximum)
        codes = _integers(blocks, scale, -129, 128) / scale
        passed = ((codes >= 128) | (codes < -128)).any(-1, keepdim=True)
        return _integers(blocks, scale_of(torch.where(passed, maximum * 2, maximum)), -128, 127)

    return blockwise(quantize, x, block=BFP16_BLOCK, axis=axis)


def microexponents(x: Tensor, name: str = "mx9", *, axis: int = -1) -> Tensor:
    """Shared microexponents, MX6 and MX9: blocks of 16, pairs with a one-bit shift.

    Subnormal inputs become zero; infinities and NaN stay, apart from the rest of their block.

    Args:
        x: float32, any shape with at least one dimension.
        name: mx6 or mx9.
        axis: the axis that the blocks lie along.

    Returns:
        float32 of the same shape.

    Raises:
        ValueError: an unknown name.
    """
    if name not in MICROEXPONENT_BITS:
        raise ValueError(f"name {name!r} is none of {', '.join(MICROEXPONENT_BITS)}")
    bits = MICROEXPONENT_BITS[name]
    limit = 2 ** (bits - 1) - 1

    def quantize(blocks: Tensor) -> Tensor:
        blocks = torch.where(blocks.abs() < MIN_NORMAL, 0.0, blocks)
        sound = torch.where(blocks.isfinite(), blocks, 0.0)
        top = exponent_of(block_max(sound))
        below = exponent_of(sound) < top
        pairs = below.reshape(*below.shape[:-1], -1, MICROEXPONENT_PAIR)
        shift = pairs.all(-1, keepdim=True).expand(pairs.shape).reshape(below.shape)
        scale = torch.pow(2.0, top - shift.to(top.dtype) - bits + 2)
        y = (blocks / scale).round().clamp(-limit, limit) * scale
        return torch.where(blocks.isfinite(), y, blocks)

    return blockwise(quantize, x, block=MICROEXPONENT_BLOCK, axis=axis)


def _even_scale(maximum: Tensor, precision: int, emax: int) -> Tensor:
    """The power of two below the maximum rounded half up to a precision, over 2**emax."""
    half = 1 << (MANTISSA_BITS - precision - 1)
    exponent = exponent_of((maximum.view(torch.int32) + half).view(torch.float32)) - emax
    # A zero maximum counts as 2**-126, and an infinite one, rounded or not, as infinite.
    exponent = torch.where(maximum == 0, 1 + MIN_E8M0_EXPONENT - emax, exponent)
    exponent = torch.where(exponent + emax > MAX_E8M0_EXPONENT, MAX_E8M0_EXPONENT, exponent)
    scale = torch.ldexp(torch.ones_like(maximum), exponent.clamp(min=MIN_E8M0_EXPONENT))
    return torch.where(maximum.isnan(), maximum, scale)


def _integers(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Fake quantization to integers; multiplies by the reciprocal of a scale that is normal."""
    scale = scale.clamp(min=MIN_NORMAL)
    return (x * (1.0 / scale)).round().clamp(low, high) * scale
