"""Integers: int1..int16 and uint1..uint16, symmetric or with a zero point.

    code = clamp(round(x / scale) + zero_point, lowest, highest)
    x'   = (code - zero_point) * scale

with round to nearest, ties to even, and the full range of codes (-128..127 for int8, not
-127..127). For a range [low, high], widened to include zero:

    symmetric:   scale = max(high / highest, low / lowest), zero_point = 0
    asymmetric:  scale = (high - low) / (highest - lowest)
                 zero_point = clamp(round(lowest - low / scale), lowest, highest)

A power-of-two scale is the smallest one not below that scale, so that nothing clips. Jacob et al.
2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 2.1; the symmetric rule uses the range's longer side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quark_core.formats import NumberFormat
from quark_core.spec import ScaleFormat
from quark_native.formats.base import Format, Parameters
from quark_native.formats.bits import MIN_NORMAL, ceil_to_power_of_two
from quark_native.formats.layout import Layout


class Integer(Format):
    """Integers with a scale, and a zero point if asymmetric."""

    covers = True

    def __init__(
        self,
        number: NumberFormat,
        layout: Layout,
        scale_format: ScaleFormat = "float32",
        symmetric: bool = True,
    ) -> None:
        super().__init__(number, layout, scale_format, symmetric)
        codes = 1 << number.bits
        self.lowest = -codes // 2 if number.signed else 0
        self.highest = self.lowest + codes - 1

    def measure(self, x: Tensor) -> Parameters:
        """Cover the smallest and the largest element under each scale."""
        return self.cover(*self.layout.extremes(x))

    def cover(self, low: Tensor, high: Tensor) -> Parameters:
        """Apply the formula of the module to a range."""
        # In float64 the difference of two float32 numbers cannot overflow.
        low, high = low.double().clamp(max=0), high.double().clamp(min=0)
        if self.symmetric:
            scale = round_scale(self._symmetric(low, high), self.scale_format)
            return Parameters(scale)
        scale = round_scale((high - low) / (self.highest - self.lowest), self.scale_format)
        zero_point = torch.round(self.lowest - low / scale).clamp(self.lowest, self.highest)
        return Parameters(scale, zero_point.nan_to_num().to(torch.int32))

    def _symmetric(self, low: Tensor, high: Tensor) -> Tensor:
        # A side without codes (below zero in uint8, above zero in int1) has no say.
        above = high / self.highest if self.highest else torch.zeros_like(high)
        below = low / self.lowest if self.lowest else torch.zeros_like(low)
        return torch.maximum(above, below)

    def _nearest(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        if zero_point is None:
            return scaled.round_().clamp_(self.lowest, self.highest)
        shift = zero_point.to(scaled.dtype)
        return scaled.round_().clamp_(self.lowest - shift, self.highest - shift)

    def _within(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        # What lies beyond an end by less than half a step is rounded to it, as anywhere else.
        return super()._within(scaled.round(), zero_point)

    def _codes(self, elements: Tensor, zero_point: Tensor | None) -> Tensor:
        codes = elements.nan_to_num().to(torch.int32)
        return codes if zero_point is None else codes + zero_point

    def _elements(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        return (codes if zero_point is None else codes - zero_point).to(torch.float32)

    def _element_limits(self) -> tuple[float, float]:
        return self.lowest, self.highest


def round_scale(scale: Tensor, scale_format: ScaleFormat) -> Tensor:
    """A scale in the format it is stored in, never zero or subnormal.

    Args:
        scale: float64, not negative.
        scale_format: ``float32`` or ``power_of_two``.

    Returns:
        float32; NaN where the scale is not finite.
    """
    if scale_format == "power_of_two":
        return ceil_to_power_of_two(scale)
    rounded = scale.clamp(MIN_NORMAL, torch.finfo(torch.float32).max).to(torch.float32)
    return torch.where(scale.isfinite(), rounded, torch.nan)
