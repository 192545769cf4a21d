"""AIMET's min-max calibration, and the scale and offset that a range gives.

    symmetric     s = max(max / p, -min / n),   min' = -n s,   max' = p s
    asymmetric    the observed range

for a grid of n + p steps with n = ceil and p = floor of half of them, over a range that includes
zero. A range of exactly 3 steps, the 2-bit grid, divides the maximum by p + 1 to use its lowest
value, and clips above. Then

    scale  = |max' - min'| / (qmax - qmin), at least the smallest scale
    offset = clamp(rnd(min' / scale) - qmin, -qmax, -qmin), or -rnd((qmin + qmax) / 2) if symmetric

Source: aimet-torch 2.42.0, quantization/encoding_analyzer.py, affine/quantizer.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quark_native.profiles.aimet.blocks import reduce

WIDEST_SMALLEST_RANGE = 0.01
"""A grid at its smallest scale spans no more than this."""


def min_max(
    x: Tensor,
    *,
    steps: float,
    symmetric: bool,
    shape: Sequence[int] = (),
    block_size: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The range AIMET calibrates from one batch.

    Args:
        x: float32, float16 or bfloat16; observed in its own dtype.
        steps: Of the grid: qmax - qmin, one less with a zero-point shift of 1/2.
        symmetric: Whether the grid's middle is zero.
        shape: Of the ranges.
        block_size: Of the blocks, if any.

    Returns:
        min and max, float32 of ``shape``.

    Raises:
        ValueError: The tensor has no such ranges.
    """
    low = reduce(x, torch.amin, shape, block_size).clamp(max=0)
    high = reduce(x, torch.amax, shape, block_size).clamp(min=0)
    # The smallest scale enters as float32, which makes everything behind it float32 too.
    widening = smallest_scale(steps) * ((high - low) / steps < smallest_scale(steps))
    if symmetric:
        above, below = math.floor(steps / 2), math.ceil(steps / 2)
        high, low = high + above * widening, low - below * widening
        scale = torch.maximum(high / (above + (steps == 3)), -low / below)
        high, low = above * scale, -below * scale
    else:
        high = high + steps * widening
    limit = torch.finfo(x.dtype).max
    low, high = low.clamp(min=-limit).to(x.dtype), high.clamp(max=limit).to(x.dtype)
    return low.to(torch.float32), high.to(torch.float32)


def scale_offset(
    min: Tensor, max: Tensor, *, qmin: int, qmax: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """What AIMET's forward pass makes of a range, with AIMET's gradients.

    Args:
        min: float32, any shape.
        max: float32, the same shape.
        qmin: Lowest integer of the grid.
        qmax: Highest integer of the grid.
        symmetric: Whether the offset follows from the grid alone.

    Returns:
        scale and offset, float32 of the same shape.
    """
    scale = ((max - min) / (qmax - qmin)).abs().clamp(min=smallest_scale(qmax - qmin))
    if symmetric:
        return scale, torch.full_like(scale, -round((qmin + qmax) / 2))
    ratio = min / scale
    rounded = ratio + (torch.round(ratio) - ratio).detach()  # exact; a gradient of 1
    return scale, (rounded - qmin).clamp(-qmax, -qmin)


def smallest_scale(steps: float) -> float:
    """Below this AIMET lets no scale fall."""
    return min(torch.finfo(torch.float32).eps, WIDEST_SMALLEST_RANGE / steps)
