"""One and two bits: binary, binary_residual and ternary.

    binary              s if x >= 0, else -s;  s = mean |x|      Rastegari et al. 2016, XNOR-Net
    binary[unit]        the same with s = 1
    binary[zero]        s if x > 0, else 0;  s = mean |x|
    binary_residual[n]  s_1 b_1 + ... + s_n b_n: binary of x, then of what that leaves, and so on;
                        n is 2 unless given. Ghasemzadeh et al. 2018, "ReBNet"
    ternary             s if x > d, -s if x < -d, else 0;  d = 3/4 mean |x|, s the mean of the |x|
                        above d. Li et al. 2016, "Ternary weight networks"; their d is 0.7 mean |x|,
                        MASE's is 3/4, which is theirs for normal distributions
    ternary[unit]       the same with s = 1

Means are over the elements that share a scale, summed in float64 and rounded to float32. -0 counts
as 0. NaN stays NaN; an infinity or NaN makes everything NaN that shares its mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quark_core.formats import NumberFormat
from quark_native.formats.base import ElementFormat, Format, Parameters
from quark_native.formats.layout import Layout
from quark_native.formats.rounding import Rounder
from quark_native.kernels.call import Call

TERNARY_THRESHOLD = 0.75
"""Share of the mean magnitude below which a value becomes zero."""


class _Means(Format):
    """Formats whose scale is a mean over the elements that share it."""

    def __init__(self, number: NumberFormat, layout: Layout) -> None:
        unit = number.name.endswith("[unit]")
        super().__init__(number, layout, "unit" if unit else "float32")
        self.unit = unit

    def _mean(self, magnitudes: Tensor, ndim: int, count: Tensor | int | None = None) -> Tensor:
        """Mean over what shares a scale; compact, float32.

        Args:
            magnitudes: Not negative, split.
            ndim: Axes of the tensor before it was split.
            count: Number of values; None counts all.
        """
        axes = self.layout.shared_axes(ndim)
        total = self._sum(magnitudes, ndim)
        if count is None:
            count = torch.Size([magnitudes.shape[axis] for axis in axes]).numel()
        mean = (total / count).to(torch.float32)
        return torch.where(mean.isfinite(), mean, torch.nan)

    def _sum(self, magnitudes: Tensor, ndim: int) -> Tensor:
        axes = self.layout.shared_axes(ndim)
        if not axes:
            return magnitudes.double().abs()
        total: Tensor = torch.linalg.vector_norm(magnitudes, 1, axes, dtype=torch.float64)
        return total

    def _mean_magnitude(self, x: Tensor) -> Tensor:
        padded = self.layout.split(x)
        if padded.numel() == x.numel():
            return self._mean(padded, x.ndim)
        there = self.layout.split(torch.ones_like(x))
        return self._mean(padded, x.ndim, self._sum(there, x.ndim))

    def store(self, parameters: Parameters) -> dict[str, Tensor]:
        """The means; nothing where the values are -1, 0 and 1."""
        return {} if self.unit else super().store(parameters)

    def restore(self, stored: dict[str, Tensor], shape: tuple[int, ...]) -> Parameters:
        """Undo :meth:`store`."""
        if self.unit:
            return Parameters(torch.ones(self.layout.compact_shape(shape)))
        return super().restore(stored, shape)

    @property
    def signed_codes(self) -> bool:
        """Codes count from zero."""
        return False


class _MeanElements(_Means, ElementFormat):
    """The ones whose values are few elements times the mean."""

    def _coded(self, x: Tensor, parameters: Parameters, rounder: Rounder) -> Tensor:
        return self._codes(self._quantized(x, parameters, rounder), None)


class Binary(_MeanElements):
    """Two values."""

    def measure(self, x: Tensor) -> Parameters:
        """The mean magnitude of what shares a scale."""
        if self.unit:
            shape = self.layout.compact_shape(tuple(x.shape))
            return Parameters(torch.ones(shape, device=x.device))
        return Parameters(self._mean_magnitude(x))

    def call(self) -> Call | None:
        """Means are given."""
        return Call("binary", low=0.0 if self.number.name == "binary[zero]" else -1.0)

    def _quantized(self, x: Tensor, parameters: Parameters, rounder: Rounder) -> Tensor:
        scale, _ = self._spread(parameters, x.ndim)
        values = self.layout.split(x)
        if self.number.name == "binary[zero]":
            found = torch.where(values > 0, scale, 0.0 * scale)
        else:
            found = torch.where(values >= 0, scale, -scale)
        return torch.where(values.isnan(), torch.nan, found)

    def _codes(self, elements: Tensor, zero_point: Tensor | None) -> Tensor:
        return (elements > 0).to(torch.int32)

    def _elements(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        low = 0.0 if self.number.name == "binary[zero]" else -1.0
        return torch.where(codes > 0, 1.0, low)

    def _element_limits(self) -> tuple[float, float]:
        return (0.0 if self.number.name == "binary[zero]" else -1.0), 1.0


class Ternary(_MeanElements):
    """Three values; ``outer`` of its parameters is the threshold."""

    def measure(self, x: Tensor) -> Parameters:
        """The threshold, and the mean magnitude of what lies above it."""
        mean = self._mean_magnitude(x)
        threshold = mean * TERNARY_THRESHOLD
        if self.unit:
            return Parameters(torch.where(mean.isfinite(), 1.0, torch.nan), outer=threshold)
        magnitudes = self.layout.split(x).abs()
        above = magnitudes > self.layout.spread(threshold, x.ndim)
        count = self._sum(above.to(torch.float32), x.ndim)
        scale = self._mean(torch.where(above, magnitudes, 0.0), x.ndim, count.clamp(min=1))
        scale = torch.where(mean.isfinite(), scale, torch.nan)
        return Parameters(torch.where(count > 0, scale, scale + 1.0), outer=threshold)

    def call(self) -> Call | None:
        """Means and thresholds are given."""
        return Call("ternary")

    def _quantized(self, x: Tensor, parameters: Parameters, rounder: Rounder) -> Tensor:
        assert parameters.outer is not None
        scale, _ = self._spread(parameters, x.ndim)
        threshold = self.layout.spread(parameters.outer, x.ndim)
        values = self.layout.split(x)
        found = torch.where(values.abs() > threshold, scale.copysign(values), 0.0 * scale)
        return torch.where(values.isnan(), torch.nan, found)

    def _codes(self, elements: Tensor, zero_point: Tensor | None) -> Tensor:
        return elements.nan_to_num().sign().to(torch.int32)

    def _elements(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        return codes.to(torch.float32)

    def _element_limits(self) -> tuple[float, float]:
        return -1.0, 1.0

    @property
    def signed_codes(self) -> bool:
        """Codes are -1, 0 and 1."""
        return True


class ResidualBinary(_Means):
    """Sums of binary numbers; a scale for each, along a first axis of ``scale``."""

    def measure(self, x: Tensor) -> Parameters:
        """The mean magnitude of what the levels before have left."""
        means, rest = [], self.layout.split(x)
        shape = tuple(x.shape)
        for _ in range(self.number.bits):
            mean = self._mean_magnitude(self.layout.join(rest, shape))
            spread = self.layout.spread(mean, x.ndim)
            means.append(mean)
            rest = rest - torch.where(rest >= 0, spread, -spread)
        return Parameters(torch.stack(means))

    def _quantized(self, x: Tensor, parameters: Parameters, rounder: Rounder) -> Tensor:
        rest = self.layout.split(x)
        total = torch.zeros_like(rest)
        for mean in parameters.scale:
            spread = self.layout.spread(mean, x.ndim)
            term = torch.where(rest >= 0, spread, -spread)
            total, rest = total + term, rest - term
        return torch.where(rest.isnan(), torch.nan, total)

    def limits(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """All signs alike."""
        total = parameters.scale.sum(0)
        return -total, total

    def inside(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Nothing is clipped: every value is the sum of signs that comes out."""
        return torch.ones_like(x, dtype=torch.bool)

    def _coded(self, x: Tensor, parameters: Parameters, rounder: Rounder) -> Tensor:
        rest, codes = self.layout.split(x), torch.zeros(1, dtype=torch.int32, device=x.device)
        for level, mean in enumerate(parameters.scale):
            spread = self.layout.spread(mean, x.ndim)
            codes = codes | ((rest >= 0).to(torch.int32) << level)
            rest = rest - torch.where(rest >= 0, spread, -spread)
        return codes

    def _decoded(self, codes: Tensor, parameters: Parameters) -> Tensor:
        total = torch.zeros((), device=codes.device)
        for level, mean in enumerate(parameters.scale):
            spread = self.layout.spread(mean, codes.ndim)
            total = total + torch.where(
                (self.layout.split(codes) >> level) & 1 > 0, spread, -spread
            )
        return total
