"""Microscaling formats as microxcaling computes them.

    s = floor(log2 M) - emax, clamped at -127, NaN above 127;  M = the block's largest magnitude
    y = round(x / 2**s to the element's grid, saturating) * 2**s

Source: microxcaling 7bc4195. It has two paths with different results: the default one in PyTorch,
which takes both exponents by float32 log2, and the one of its extension, which reads the bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quark_native.formats.bits import MIN_EXPONENT, MIN_NORMAL, exponent_of

from ._common import (
    MAX_E8M0_EXPONENT,
    MIN_E8M0_EXPONENT,
    Element,
    block_max,
    blockwise,
    element_of,
    round_to_grid,
)

VERSION = "7bc4195"


def mx_torch(
    x: Tensor,
    element: str = "fp8_e4m3",
    *,
    block: int = 32,
    axis: int = -1,
    rounding: str = "nearest",
    flush_fp32_subnorms: bool = False,
) -> Tensor:
    """What microxcaling returns without its extension (custom_cuda off).

    Unlike OCP MX: float32 log2 takes a maximum up to 44 ulp below a power of two for that power,
    which doubles the scale, and element exponents suffer alike; close to the largest float32 the
    scale overflows. "nearest", the default, sends ties away from zero, and rounds 0.5 - 2**-25 of
    a quantum up, because adding 0.5 rounds.

    Args:
        x: float32, any shape with at least one dimension.
        element: fp8_e4m3, fp8_e5m2, fp6_e3m2, fp6_e2m3, fp4_e2m1, int8, int4 or int2.
        block: elements a block; 0 for the whole axis.
        axis: the axis that the blocks lie along.
        rounding: nearest (ties away), even (ties to even) or floor (toward zero).
        flush_fp32_subnorms: zero every block whose maximum is a subnormal float32.

    Returns:
        float32 of the same shape; all NaN in a block that holds an infinity or NaN.
    """
    grid = element_of(element)

    def quantize(blocks: Tensor) -> Tensor:
        maximum = block_max(blocks)
        shared = torch.where(maximum == 0, MIN_NORMAL, maximum).log2().floor()
        if flush_fp32_subnorms:
            blocks = blocks * (shared > MIN_E8M0_EXPONENT)
        shared = shared - grid.emax
        shared = torch.where(shared > MAX_E8M0_EXPONENT, torch.nan, shared)
        scale = 2 ** shared.clamp(min=MIN_E8M0_EXPONENT)
        return _round_by_log2(blocks / scale, grid, rounding) * scale

    return blockwise(quantize, x, block=block, axis=axis)


def mx_cpp(
    x: Tensor,
    element: str = "fp8_e4m3",
    *,
    block: int = 32,
    axis: int = -1,
    rounding: str = "nearest",
    flush_fp32_subnorms: bool = False,
) -> Tensor:
    """What microxcaling returns through its extension (custom_cuda on).

    Exact, so rounding "even" is OCP MX with a floor scale. Its zeros are all positive.

    Args:
        x: float32, any shape with at least one dimension.
        element: as for :func:`mx_torch`.
        block: elements a block; 0 for the whole axis.
        axis: the axis that the blocks lie along.
        rounding: nearest (ties away), even (ties to even) or floor (toward zero).
        flush_fp32_subnorms: zero every block whose maximum is a subnormal float32.

    Returns:
        float32 of the same shape; all NaN in a block that holds an infinity or NaN.
    """
    grid = element_of(element)

    def quantize(blocks: Tensor) -> Tensor:
        maximum = block_max(blocks)
        shared = exponent_of(maximum)
        if flush_fp32_subnorms:
            blocks = torch.where(shared < MIN_EXPONENT, 0.0, blocks)
        shared = (shared - grid.emax).clamp(min=MIN_E8M0_EXPONENT)
        scale = torch.ldexp(torch.ones_like(maximum), shared)
        scale = torch.where(maximum.isfinite(), scale, torch.nan)
        return round_to_grid(blocks / scale, grid, rounding) * scale + 0.0

    return blockwise(quantize, x, block=block, axis=axis)


def _round_by_log2(x: Tensor, grid: Element, rounding: str) -> Tensor:
    """Rounds scaled values in the order and precision of the library's element function."""
    shift = 2.0**grid.mantissa_bits
    unit = torch.ones_like(x)
    if grid.exponent_bits:
        private = torch.where(x == 0, 1.0, x.abs()).log2().floor()
        unit = 2 ** private.clamp(min=grid.emin)
    magnitude = x.abs() / unit * shift
    if rounding == "floor":
        magnitude = magnitude.floor()
    elif rounding == "nearest":
        magnitude = (magnitude + 0.5).floor()
    elif rounding == "even":
        ties_down = (magnitude - 0.5) % 2 == 0
        magnitude = (magnitude + 0.5).floor() - ties_down.to(x.dtype)
    else:
        raise ValueError(f"rounding {rounding!r} is none of nearest, even, floor")
    return (x.sign() * magnitude / shift * unit).clamp(-grid.max, grid.max)
