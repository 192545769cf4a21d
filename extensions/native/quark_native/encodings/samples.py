"""The values an observer has seen: kept whole, or counted in a histogram."""

from __future__ import annotations

from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from quark_native.encodings.extremes import MinMax
from quark_native.formats import Format, Layout, Parameters

_KEY_BITS = 18
_DROPPED_BITS = 32 - _KEY_BITS
_HALF = 1 << (_KEY_BITS - 1)
_SIGN_MASK = 0x7FFFFFFF


class Sample(Protocol):
    """What percentile and mean squared error need to know of the values seen."""

    def add(self, x: Tensor) -> None:
        """Take in a batch."""

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value under each scale."""

    def percentile(self, percent: float, *, magnitude: bool) -> tuple[Tensor, Tensor]:
        """Bounds [low, high] such that ``percent`` of the values lie on the inner side of each.

        Args:
            percent: Above 50.
            magnitude: Rank values by magnitude, so that low = -high.
        """

    def squared_error(self, parameters: Parameters) -> Tensor:
        """Sum of squared quantization errors under each scale, if it were ``parameters``."""


class Whole:
    """One tensor, kept as it is: exact. For weights.

    A percentile is of nearest rank: the smallest value that is not below ``percent`` of all.
    """

    def __init__(self, fmt: Format) -> None:
        self._format = fmt
        self._extremes = MinMax(fmt)
        self._x = torch.empty(0)

    def add(self, x: Tensor) -> None:
        """Take in the tensor; a later one takes its place."""
        self._extremes = MinMax(self._format)
        self._extremes.observe(x)
        self._x = x.detach().to(torch.float32)

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value under each scale."""
        return self._extremes.range()

    def percentile(self, percent: float, *, magnitude: bool) -> tuple[Tensor, Tensor]:
        """Values of nearest rank among those that share a scale."""
        self._extremes.range()
        # NaN marks the padding of a short group and sorts behind every number.
        rows = _rows(self._format.layout, self._x)
        if magnitude:
            high = _nearest_rank(rows.abs(), percent)
            return -high, high
        return -_nearest_rank(-rows, percent), _nearest_rank(rows, percent)

    def squared_error(self, parameters: Parameters) -> Tensor:
        """Exact, in float32."""
        error = self._format.fake_quantize(self._x, parameters) - self._x
        layout = self._format.layout
        squares, axes = layout.split(error.square_()), layout.shared_axes(error.ndim)
        return squares.sum(axes) if axes else squares


class Histogram:
    """Counts of values in 2^18 buckets of equal relative width. For streams of activations.

    A bucket is what float32 numbers share in sign, exponent and the first 9 mantissa bits, so
    its width is 1/512 of its power of two. Buckets do not depend on the data: batches can come
    in any order, and no count is ever redistributed. One scale for the whole tensor only.

    A percentile is the outer edge of the bucket of nearest rank, so at least ``percent`` of the
    values are covered.
    """

    def __init__(self, fmt: Format) -> None:
        self._format = fmt
        self._extremes = MinMax(fmt)
        self._counts = torch.zeros(1 << _KEY_BITS, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        """Count the values of a batch."""
        self._extremes.observe(x)
        keys = _ordered_key(x.detach().to(torch.float32)) >> _DROPPED_BITS
        counts = torch.bincount((keys + _HALF).flatten(), minlength=1 << _KEY_BITS)
        self._counts = self._counts.to(x.device).add_(counts)

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value."""
        return self._extremes.range()

    def percentile(self, percent: float, *, magnitude: bool) -> tuple[Tensor, Tensor]:
        """Bucket edges of nearest rank."""
        low, high = self.extremes()
        if magnitude:
            # Bucket ~k holds the negatives of bucket k.
            counts = self._counts[_HALF:] + self._counts[:_HALF].flip(0)
            edge = self._upper_edge(_first_of_rank(counts, percent))
            return -edge, edge
        top = _first_of_rank(self._counts, percent) - _HALF
        bottom = _HALF - 1 - _first_of_rank(self._counts.flip(0), percent)
        return (
            torch.maximum(-self._upper_edge(~bottom), low),
            torch.minimum(self._upper_edge(top), high),
        )

    def squared_error(self, parameters: Parameters) -> Tensor:
        """Every value taken for the middle of its bucket."""
        keys = self._counts.nonzero().squeeze(1)
        counts = self._counts[keys]
        middles = ((keys - _HALF) << _DROPPED_BITS) | (1 << (_DROPPED_BITS - 1))
        values = _value_of_key(middles.to(torch.int32))
        error = self._format.fake_quantize(values, parameters) - values
        return (error.double().square() * counts).sum()

    def _upper_edge(self, bucket: Tensor) -> Tensor:
        last = (bucket << _DROPPED_BITS) | ((1 << _DROPPED_BITS) - 1)
        return _value_of_key(last.to(torch.int32))


def _ordered_key(x: Tensor) -> Tensor:
    """Integers in the order of the float32 numbers: negative ones have their bits turned."""
    bits = x.view(torch.int32)
    return bits ^ ((bits >> 31) & _SIGN_MASK)


def _value_of_key(key: Tensor) -> Tensor:
    return (key ^ ((key >> 31) & _SIGN_MASK)).view(torch.float32)


def _first_of_rank(counts: Tensor, percent: float) -> Tensor:
    """Index of the first bucket up to which ``percent`` of all are counted."""
    cumulated = counts.cumsum(0)
    return torch.searchsorted(cumulated, _rank(cumulated[-1], percent))


def _nearest_rank(rows: Tensor, percent: float) -> Tensor:
    """The value of nearest rank in each row; NaN is no value."""
    values = rows.sort(-1).values
    count = values.isnan().logical_not_().sum(-1, keepdim=True)
    return values.gather(-1, (_rank(count, percent) - 1).clamp_(min=0)).squeeze(-1)


def _rank(count: Tensor, percent: float) -> Tensor:
    """ceil(count * percent / 100) in integers, so that 99.9 % of 1000 is 999."""
    share = Fraction(str(percent)) / 100
    return -(-count * share.numerator // share.denominator)


def _rows(layout: Layout, x: Tensor) -> Tensor:
    """The values that share a scale along the last axis, before it the compact shape."""
    blocks, shared = layout.split(x, fill=torch.nan), layout.shared_axes(x.ndim)
    kept = [axis for axis in range(blocks.ndim) if axis not in shared]
    return blocks.permute(*kept, *shared).reshape(*(blocks.shape[axis] for axis in kept), -1)
