"""Observers that leave outliers out: by rank, or by the error that results."""

from __future__ import annotations

import torch
from torch import Tensor

from quark_native.encodings.base import Observer
from quark_native.encodings.samples import Sample
from quark_native.formats import Format

CLIP_RATIOS = tuple(0.975**step for step in range(64))
"""Shares of the full range that are tried, 1 down to 0.2 in equal relative steps."""


class _Sampling(Observer):
    def __init__(self, fmt: Format, sample: Sample) -> None:
        super().__init__(fmt)
        self.sample = sample

    def observe(self, x: Tensor) -> None:
        """Add x to the sample."""
        if x.numel():
            self.sample.add(x)


class Percentile(_Sampling):
    """A range that leaves the outermost values out.

    Symmetric formats cover ``percent`` of the magnitudes; asymmetric ones leave
    100 - ``percent`` of the values out on each side.
    """

    def __init__(self, fmt: Format, sample: Sample, percent: float) -> None:
        super().__init__(fmt, sample)
        self.percent = percent

    def range(self) -> tuple[Tensor, Tensor]:
        """The percentiles, never wider than the values seen."""
        lowest, highest = self.sample.extremes()
        if not bool((lowest.isfinite() & highest.isfinite()).all()):
            return lowest, highest
        low, high = self.sample.percentile(self.percent, magnitude=self.format.symmetric)
        return torch.maximum(low, lowest), torch.minimum(high, highest)


class MeanSquaredError(_Sampling):
    """The share of the full range whose quantization error is smallest, for each scale.

    Both ends shrink by the same ratio, one of :data:`CLIP_RATIOS`; of equal errors the wider
    range is taken.
    """

    def range(self) -> tuple[Tensor, Tensor]:
        """The full range times the best ratio."""
        low, high = self.sample.extremes()
        best_ratio = torch.ones_like(low)
        best_error: Tensor | None = None
        for ratio in CLIP_RATIOS:
            error = self.sample.squared_error(self.format.cover(low * ratio, high * ratio))
            if best_error is None:
                best_error = error
                continue
            better = error < best_error
            best_ratio = torch.where(better, ratio, best_ratio)
            best_error = torch.where(better, error, best_error)
        return low * best_ratio, high * best_ratio
