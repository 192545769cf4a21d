"""Blocks whose scale is a small float: NVFP4, and d-Matrix's SBFP.

nvfp4: 16 elements fp4_e2m1 share an fp8_e4m3 scale, and all of the tensor a float32 scale T. With
M = max |x| of the block:

    T = max |x| of the tensor / (448 * 6)        nvfp4_one_level: T = 1
    s = e4m3(M / 6 / T)
    x' = nearest(x / (s * T)) * (s * T)

Source: NVIDIA, "Introducing NVFP4". s is rounded to nearest, and at least e4m3's smallest number,
2^-9, so that no block with values gets a scale of zero. (torchao starts at 2^-6.)

sbfp[p|e|m,b]{B}: B integers of p bits without the lowest share an unsigned minifloat scale:

    s  = fp[0|e|m,b](M / (2^(p-1) - 1))
    x' = clamp(round(x / s), -(2^(p-1) - 1), 2^(p-1) - 1) * s

Source: dmx-compressor's SBFP<XP[p,0](CSN)><FP[0|e|m,b](FN)>{B}: s that rounds to a subnormal number
becomes zero, and the block with it. It divides by the scale before it is rounded, and multiplies by
the rounded one; we take the nearest element under the scale that is used.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from quark_core.formats import NumberFormat, parse_format
from quark_core.spec import Rounding, ScaleFormat
from quark_native.formats.base import GridFormat, Parameters
from quark_native.formats.layout import Layout
from quark_native.formats.minifloat import Minifloat, element_call, element_of
from quark_native.formats.rounding import Rounder
from quark_native.kernels.call import Call


class _FloatScaled(GridFormat):
    """Blocks with scales that are elements of a minifloat, times an outer scale."""

    scale_element: Minifloat

    def __init__(
        self, number: NumberFormat, layout: Layout, scale_format: ScaleFormat, rounding: Rounding
    ) -> None:
        layout = replace(layout, kind="group", size=number.block or 1)
        super().__init__(number, layout, scale_format, rounding=rounding)

    @abstractmethod
    def _outer(self, largest: Tensor) -> Tensor:
        """The scale of scales, for the largest magnitudes of the blocks."""

    def store(self, parameters: Parameters) -> dict[str, Tensor]:
        """The codes of the blocks' scales, and the outer scale if there is one."""
        assert parameters.outer is not None
        inner = self._inner(parameters.scale / parameters.outer)
        stored = {"scale": self.scale_element.encode(inner).to(torch.uint8)}
        if self.number.name == "nvfp4":
            stored["outer"] = parameters.outer
        return stored

    def restore(self, stored: dict[str, Tensor], shape: tuple[int, ...]) -> Parameters:
        """Undo :meth:`store`."""
        inner = self.scale_element.decode(stored["scale"].to(torch.int32))
        outer = stored.get("outer", torch.ones((), device=inner.device))
        return Parameters(inner * outer, outer=outer)

    @abstractmethod
    def _inner(self, scale: Tensor) -> Tensor:
        """The nearest scale that can be stored; NaN stays NaN."""


class Nvfp4(_FloatScaled):
    """NVFP4 with one or two levels of scales."""

    def __init__(
        self, number: NumberFormat, layout: Layout, rounding: Rounding = "nearest_even"
    ) -> None:
        super().__init__(number, layout, "fp8_e4m3", rounding)
        self.element = element_of(parse_format("fp4_e2m1"))
        self.scale_element = element_of(parse_format("fp8_e4m3"))

    def measure(self, x: Tensor) -> Parameters:
        """Scales of the blocks that put their maximum on 6, as near as e4m3 comes."""
        largest = self.layout.largest(x)
        outer = self._outer(largest)
        wanted = largest.double() / self.element.max / outer.double()
        # Doubles that lie near a tie must not be rounded to it first, on their way to e4m3.
        inner = self._inner(_to_odd(wanted))
        scale = inner * outer
        return Parameters(torch.where(largest.isfinite(), scale, torch.nan), outer=outer)

    def call(self) -> Call | None:
        """One pass over the blocks; the outer scale is given."""
        return element_call("nvfp", self.element, self.rounding)

    def outer_parameters(self, x: Tensor) -> Parameters:
        """The outer scale, found in a pass of its own."""
        if self.number.name != "nvfp4":
            one = torch.ones((), device=x.device)
            return Parameters(one, outer=one)
        low, high = torch.aminmax(x)
        largest = torch.maximum(high, -low).to(torch.float32)
        if not largest.isfinite():  # blocks that hold an infinity or NaN do not count
            largest = self.layout.largest(x.to(torch.float32))
        return Parameters(largest, outer=self._outer(largest))

    def _outer(self, largest: Tensor) -> Tensor:
        if self.number.name != "nvfp4":
            return torch.ones((), device=largest.device)
        finite = torch.where(largest.isfinite(), largest, 0.0)
        whole = finite.max().double() / (self.scale_element.max * self.element.max)
        return torch.where(whole > 0, whole, 1.0).clamp_(min=2.0**-117).to(torch.float32)

    def _inner(self, scale: Tensor) -> Tensor:
        return self.scale_element.nearest(scale).clamp_(min=2.0**-9)

    def _round(self, scaled: Tensor, zero_point: Tensor | None, rounder: Rounder) -> Tensor:
        return self.element.round(scaled, rounder)

    def _codes(self, elements: Tensor, zero_point: Tensor | None) -> Tensor:
        return self.element.encode(elements)

    def _elements(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        return self.element.decode(codes)

    def _element_limits(self) -> tuple[float, float]:
        return -self.element.max, self.element.max


class ScaledBlockFloat(_FloatScaled):
    """SBFP: small integers with a minifloat scale."""

    def __init__(
        self, number: NumberFormat, layout: Layout, rounding: Rounding = "nearest_even"
    ) -> None:
        super().__init__(number, layout, "minifloat", rounding)
        self.highest = (1 << (number.bits - 1)) - 1
        _, exponent, rest = number.name.partition("{")[0].rstrip("]").split("|")
        mantissa, comma, bias = rest.partition(",")
        usual = (1 << int(exponent) >> 1) - 1
        self.scale_element = Minifloat(
            int(exponent), int(mantissa), int(bias) if comma else usual, signed=False, flush=True
        )

    def measure(self, x: Tensor) -> Parameters:
        """Scales of the blocks that put their maximum on the largest integer."""
        largest = self.layout.largest(x)
        inner = self._inner(_to_odd(largest.double() / self.highest))
        outer = self._outer(largest)
        return Parameters(torch.where(largest.isfinite(), inner, torch.nan), outer=outer)

    def store(self, parameters: Parameters) -> dict[str, Tensor]:
        """The codes of the scales; int32, since they may have more than eight bits."""
        assert parameters.outer is not None
        return {"scale": self.scale_element.encode(self._inner(parameters.scale))}

    def _outer(self, largest: Tensor) -> Tensor:
        return torch.ones((), device=largest.device)

    def _inner(self, scale: Tensor) -> Tensor:
        return self.scale_element.nearest(scale)

    def _round(self, scaled: Tensor, zero_point: Tensor | None, rounder: Rounder) -> Tensor:
        # 0 / 0 under a scale of zero; what is NaN for another reason has a NaN scale.
        return rounder(scaled.nan_to_num_(0.0)).clamp_(-self.highest, self.highest)

    def _codes(self, elements: Tensor, zero_point: Tensor | None) -> Tensor:
        return elements.nan_to_num().to(torch.int32)

    def _elements(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        return codes.to(torch.float32)

    def _element_limits(self) -> tuple[float, float]:
        return -self.highest, self.highest


def _to_odd(x: Tensor) -> Tensor:
    """float64 to float32, rounded to odd: a further rounding, to far fewer bits, is then exact."""
    near = x.to(torch.float32)
    exact = near.double() == x
    bits = near.view(torch.int32)
    # The neighbour towards x, if the rounded one is even.
    step = torch.where(near.double() > x, -1, 1).to(torch.int32)
    odd = torch.where(((bits & 1) == 0) & ~exact, bits + step, bits)
    return odd.view(torch.float32)
