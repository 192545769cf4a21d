"""Microscaling formats as gfloat's block quantization computes them.

    s = clamp(floor(log2 M) - emax, -127, 127), -127 for a block of zeros
    y = RNE(x / 2**s to the element's grid, saturating) * 2**s;  M = the block's largest magnitude

Source: gfloat 0.5.2, quantize_block with compute_scale_amax, which takes one block at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import (
    MAX_E8M0_EXPONENT,
    MIN_E8M0_EXPONENT,
    block_max,
    blockwise,
    element_of,
    exact_exponent,
    round_to_grid,
)

VERSION = "0.5.2"

INT8_MIN = -2.0
INT8_FRACTION = 64


def mx(x: Tensor, element: str = "fp8_e4m3", *, block: int = 32, axis: int = -1) -> Tensor:
    """MX formats of the library's table.

    Unlike the other libraries: int8 has the code -128, which OCP MX permits; an infinity takes
    the largest scale, which makes it infinite again (int8: 254 * 2**126) and the block's others
    zero. The library computes in the precision of its input; this is float64, in which all
    float32 values have exact exponents.

    Args:
        x: float32, any shape with at least one dimension.
        element: fp8_e4m3, fp8_e5m2, fp6_e3m2, fp6_e2m3, fp4_e2m1 or int8.
        block: elements a block.
        axis: the axis that the blocks lie along.

    Returns:
        float32 of the same shape; all NaN in a block that holds NaN.

    Raises:
        ValueError: an unknown element, or NaN in a format that has none.
    """
    grid = element_of(element, without=("int4", "int2"))
    if not element.startswith("fp8") and x.isnan().any():
        raise ValueError(f"{element} has no NaN")

    def quantize(blocks: Tensor) -> Tensor:
        maximum = block_max(blocks)
        exponent = (exact_exponent(maximum) - grid.emax).clamp(MIN_E8M0_EXPONENT)
        exponent = torch.where(maximum.isinf(), MAX_E8M0_EXPONENT, exponent)
        scale = torch.ldexp(torch.ones_like(maximum), exponent)
        scale = torch.where(maximum.isnan(), maximum, scale)
        scaled = blocks / scale
        if element == "int8":
            codes = (scaled * INT8_FRACTION).round() / INT8_FRACTION
            return codes.clamp(INT8_MIN, grid.max) * scale
        return round_to_grid(scaled, grid) * scale

    return blockwise(quantize, x, block=block, axis=axis)
