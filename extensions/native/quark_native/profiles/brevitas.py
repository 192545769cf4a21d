"""Microscaling formats as Brevitas' MX quantizers compute them.

    scale = max(2**floor(log2 max(M, 1e-10)), 1e-10) / 2**emax, M the block's largest magnitude
    y = RNE(x / scale to the element's grid, or to -128..127) * scale

Source: Brevitas 0.13.4. It ships MXFloat8e4m3 and MXInt8; the other elements are what subclasses
with other bit widths give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quark_native.formats.bits import MIN_NORMAL

from ._common import block_max, blockwise, element_of

VERSION = "0.13.4"

MIN_SCALE = 1e-10
INT8_CODES = (-128, 127)


def mx(x: Tensor, element: str = "fp8_e4m3", *, block: int = 32, axis: int = -1) -> Tensor:
    """MXFloat8e4m3 and its subclasses, MXInt8.

    Unlike OCP MX: the scale before its division stays at or above 1e-10, no power of two, so
    blocks below about 1e-8 collapse; exponents of blocks and elements come of a float32 log2,
    wrong next to powers of two. int8 divides by 2**7 instead of 2**6, so that everything from
    2**E up clips, half of most blocks' range.

    Args:
        x: float32, any shape with at least one dimension.
        element: fp8_e4m3, fp8_e5m2, fp6_e3m2, fp6_e2m3, fp4_e2m1 or int8.
        block: elements a block.
        axis: the axis that the blocks lie along (group_dim).

    Returns:
        float32 of the same shape; all NaN in a block that holds an infinity or NaN.

    Raises:
        ValueError: the element is unknown.
    """
    grid = element_of(element, without=("int4", "int2"))

    def quantize(blocks: Tensor) -> Tensor:
        maximum = block_max(blocks).clamp(min=MIN_SCALE)
        power = (2 ** maximum.log2().floor()).clamp(min=MIN_SCALE)
        if element == "int8":
            low, high = INT8_CODES
            scale = power / -low
            return (blocks / scale).round().clamp(low, high) * scale
        scale = power / 2.0**grid.emax
        scaled = blocks / scale
        # The smallest normal float32 keeps log2 from zero; what else it changes is clamped.
        exponent = (scaled.abs() + MIN_NORMAL).log2().floor().clamp(min=grid.emin)
        quantum = torch.exp2(exponent - grid.mantissa_bits)
        return ((scaled / quantum).round() * quantum).clamp(-grid.max, grid.max) * scale

    return blockwise(quantize, x, block=block, axis=axis)
