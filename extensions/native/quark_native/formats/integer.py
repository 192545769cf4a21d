"""Integers: int1..int32 and uint1..uint32, symmetric or with a zero point; fixed point; LPBQ.

    code = clamp(round(x / scale) + zero_point, lowest, highest)
    x'   = (code - zero_point) * scale

with the full range of codes (-128..127 for int8) unless the range is narrow (-127..127). For a
range [low, high], widened to include zero:

    symmetric:   scale = max(high / highest, low / lowest), zero_point = 0
    asymmetric:  scale = (high - low) / (highest - lowest)
                 zero_point = clamp(round(lowest - low / scale), lowest, highest)

A power-of-two scale is the smallest one not below that scale, so that nothing clips. Jacob et al.
2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 2.1; the symmetric rule uses the range's longer side. More than 24 bits are
computed in float64.

fixed[w,f] is the integer format of w bits with the scale 2^-f. Its letters are d-Matrix's, as in
XP[w,f](CSR): C clamps (``_`` does not), S leaves the lowest code out, R rounds to nearest (N),
down (D) or up (U).

lpbq[b|d]{B}, low-power blockwise quantization: b-bit integers in blocks whose scale is an integer
k of d - b bits times a float32 scale of the channel. With the scales s of the blocks as above:

    channel = max over its blocks of s / 2^(d-b)
    k       = clamp(round(s / channel), 1, 2^(d-b))
    scale   = k * channel

Source: AIMET's grouped blocks. k = 2^(d-b) is stored as k - 1.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quark_core.formats import NumberFormat
from quark_core.spec import Rounding, ScaleFormat
from quark_native.formats.base import GridFormat, Parameters
from quark_native.formats.bits import MIN_NORMAL, ceil_to_power_of_two
from quark_native.formats.layout import Layout
from quark_native.formats.rounding import Rounder
from quark_native.kernels.call import Call

_FLOAT32_BITS = 24
_KERNEL_BITS = 22


class Integer(GridFormat):
    """Integers with a scale, and a zero point if asymmetric."""

    covers = True

    def __init__(
        self,
        number: NumberFormat,
        layout: Layout,
        scale_format: ScaleFormat = "float32",
        symmetric: bool = True,
        rounding: Rounding = "nearest_even",
        *,
        narrow: bool = False,
    ) -> None:
        super().__init__(number, layout, scale_format, symmetric, rounding)
        codes = 1 << number.bits
        self.lowest = -codes // 2 if number.signed else 0
        self.highest = self.lowest + codes - 1
        self.lowest += narrow

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.number.bits > _FLOAT32_BITS else torch.float32

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
        return Parameters(scale, zero_point.nan_to_num().to(self._code_dtype))

    def call(self) -> Call | None:
        """Any layout; scales and zero points are given."""
        if self.number.bits > _KERNEL_BITS:
            return None
        return Call("affine", self.rounding, low=self.lowest, high=self.highest)

    @property
    def _code_dtype(self) -> torch.dtype:
        return torch.int64 if self.highest > torch.iinfo(torch.int32).max else torch.int32

    def _symmetric(self, low: Tensor, high: Tensor) -> Tensor:
        # A side without codes (below zero in uint8, above zero in int1) has no say, but for what
        # is not finite.
        above = high / self.highest if self.highest else high * 0
        below = low / self.lowest if self.lowest else low * 0
        return torch.maximum(above, below)

    def _round(self, scaled: Tensor, zero_point: Tensor | None, rounder: Rounder) -> Tensor:
        # Bounds are integers: it makes no difference whether values are clipped or rounded first.
        if zero_point is None and self.lowest < 0:
            return rounder(scaled.clamp_(self.lowest, self.highest))
        shift = 0 if zero_point is None else zero_point.to(scaled.dtype)
        low, high = self.lowest - shift, self.highest - shift
        # Not clamp, which leaves open what becomes of -0 at a bound of 0.
        scaled = torch.where(scaled <= low, low, scaled)
        return rounder(torch.where(scaled > high, high, scaled))

    def _within(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        # What lies beyond an end by less than half a step is rounded to it, as anywhere else.
        return super()._within(scaled.round(), zero_point)

    def _codes(self, elements: Tensor, zero_point: Tensor | None) -> Tensor:
        codes = elements.nan_to_num().to(self._code_dtype)
        return codes if zero_point is None else codes + zero_point

    def _elements(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        return (codes if zero_point is None else codes - zero_point).to(self._dtype)

    def _element_limits(self) -> tuple[float, float]:
        return self.lowest, self.highest


class FixedPoint(GridFormat):
    """Fixed-point numbers: one scale, a power of two that the format's name says."""

    def __init__(self, number: NumberFormat, rounding: Rounding = "nearest_even") -> None:
        name, _, letters = number.name.partition("(")
        super().__init__(number, Layout(), "unit", rounding=_LETTERS.get(letters[2:3], rounding))
        self.fraction = int(name.rpartition(",")[2].rstrip("]"))
        codes = 1 << number.bits
        self.clamps = not letters.startswith("_")
        self.lowest = -codes // 2 if number.signed else 0
        self.highest = self.lowest + codes - 1
        self.lowest += letters[1:2] == "S"

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.number.bits > _FLOAT32_BITS else torch.float32

    def measure(self, x: Tensor) -> Parameters:
        """The scale of the name."""
        return Parameters(torch.tensor(2.0**-self.fraction, device=x.device))

    def call(self) -> Call | None:
        """Clamping formats only: without, an element may have any number of bits."""
        if self.number.bits > _KERNEL_BITS or not self.clamps:
            return None
        return Call("affine", self.rounding, low=self.lowest, high=self.highest)

    def store(self, parameters: Parameters) -> dict[str, Tensor]:
        """Nothing: the name says the scale."""
        return {}

    def restore(self, stored: dict[str, Tensor], shape: tuple[int, ...]) -> Parameters:
        """The scale of the name."""
        return Parameters(torch.tensor(2.0**-self.fraction))

    def _round(self, scaled: Tensor, zero_point: Tensor | None, rounder: Rounder) -> Tensor:
        if self.clamps:
            scaled = torch.where(scaled <= self.lowest, self.lowest, scaled).clamp_(
                max=self.highest
            )
        return rounder(scaled)

    def _codes(self, elements: Tensor, zero_point: Tensor | None) -> Tensor:
        if not self.clamps:
            raise ValueError(f"{self.number.name} does not clamp: its values have no codes")
        return elements.nan_to_num().to(torch.int64 if self.highest >= 2**31 else torch.int32)

    def _elements(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        return codes.to(self._dtype)

    def _element_limits(self) -> tuple[float, float]:
        return (self.lowest, self.highest) if self.clamps else (-torch.inf, torch.inf)


_LETTERS: dict[str, Rounding] = {"N": "nearest_even", "D": "floor", "U": "ceil"}


class LowPowerBlockwise(Integer):
    """LPBQ: integer scales of blocks times a float32 scale of each channel."""

    covers = False

    def __init__(
        self, number: NumberFormat, layout: Layout, rounding: Rounding = "nearest_even"
    ) -> None:
        if layout.kind != "block":
            layout = replace(layout, kind="group", size=number.block or 1)
        super().__init__(number, layout, "integer", rounding=rounding)
        wide = int(number.name.partition("|")[2].partition("]")[0])
        self.steps = 1 << (wide - number.bits)

    def cover(self, low: Tensor, high: Tensor) -> Parameters:
        """Apply the formula of the module to a range."""
        low, high = low.double().clamp(max=0), high.double().clamp(min=0)
        wanted = round_scale(self._symmetric(low, high), "float32")
        channel = (self._over_channel(wanted) / self.steps).clamp_(min=MIN_NORMAL)
        ratio = (wanted / channel).round_().clamp_(1, self.steps)
        return Parameters(ratio * channel, outer=channel)

    def store(self, parameters: Parameters) -> dict[str, Tensor]:
        """The blocks' integers less one, packed where they are small, and the channels' scales."""
        assert parameters.outer is not None
        ratio = (parameters.scale / parameters.outer).round_().nan_to_num_(1.0) - 1
        narrow = torch.uint8 if self.steps <= 256 else torch.int32
        return {"scale": ratio.to(narrow), "outer": parameters.outer}

    def restore(self, stored: dict[str, Tensor], shape: tuple[int, ...]) -> Parameters:
        """Undo :meth:`store`."""
        channel = stored["outer"]
        return Parameters((stored["scale"].to(torch.float32) + 1) * channel, outer=channel)

    def _over_channel(self, scale: Tensor) -> Tensor:
        """The largest scale of each channel: of axis 0, unless the blocks run along that."""
        along = self.layout.axis % scale.ndim if self.layout.kind == "group" else -1
        channel = 1 if along == 0 and scale.ndim > 1 else 0
        others = [axis for axis in range(scale.ndim) if axis != channel]
        return scale.amax(others, keepdim=True) if others else scale.amax(0, keepdim=True)


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
