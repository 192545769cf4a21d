"""AWQ: channels that matter are multiplied up before quantizing (Lin et al., arXiv 2306.00978).

For a weight W [outputs, inputs] and inputs with mean magnitudes m and second moments H, factors
s = m^a for a in 0, 1/steps, ... are tried, and those with the smallest error

    trace(D H D^T),  D = Q(W s) / s - W

are kept, over sqrt(max s * min s). What comes in is divided by them at run time, or the norm or
layer that writes it is. Layers that read the same channels then share factors, m is the largest of
theirs, and their errors are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from quark_brevitas.algorithms.columns import (
    input_columns,
    input_of,
    require_finite,
    second_moments,
)
from quark_brevitas.fusing import Region, fold, per_channel
from quark_brevitas.options import AWQ
from quark_core.batch import Batch
from quark_core.partial import Partial

_KEPT = "awq"
_LEAST = 1e-4
"""Smallest magnitude, relative to the largest, for channels that are nothing but zero."""


class Scaling:
    """AWQ over the float Linear layers of a model.

    Args:
        model: The float model.
        layers: Its Linear layers that will be quantized, by name.
        regions: Layers that share factors; each of ``layers`` is in one.
        rounded: Quantizes and dequantizes a weight with the quantizer of a layer.
        put: Puts a factor [inputs] before a layer that nothing else can divide for.
        options: How many factors are tried.
        partial: Where the result is kept.
    """

    def __init__(
        self,
        model: Any,
        layers: Mapping[str, Any],
        regions: Sequence[Region],
        rounded: Callable[[str, Tensor], Tensor],
        put: Callable[[str, Tensor], None],
        options: AWQ,
        partial: Partial,
    ) -> None:
        self._model, self._layers, self._rounded, self._put = model, layers, rounded, put
        self._options, self._partial = options, partial
        self._regions = {next(name for name in one.sinks if name in layers): one for one in regions}
        self._moments: dict[str, Tensor] = {}
        self._sizes: dict[str, Tensor] = {}

    def passes(self) -> Iterator[str]:
        """One pass over the data, then factors are searched and put before layers."""
        factors = self._partial.get(_KEPT)
        if factors is None:
            with ExitStack() as stack:
                for name, layer in self._layers.items():

                    def look(module: Any, args: tuple[Any, ...], name: str = name) -> None:
                        self._look(name, input_columns(module, input_of(name, args)))

                    stack.callback(layer.register_forward_pre_hook(look).remove)
                yield "awq"
            factors = {
                first: factor
                for first, region in self._regions.items()
                if (factor := self._search(region)) is not None
            }
            self._partial.put(_KEPT, factors)
        # After all searches: columns of one region may be rows of another.
        for first, region in self._regions.items():
            if (factor := factors.get(first)) is not None:
                fold(self._model, region, factor)
                if not region.source:
                    self._put(first, 1 / factor)

    def feed(self, batch: Batch) -> None:
        """Run one batch."""
        batch.run(self._model)

    def _look(self, name: str, columns: Tensor) -> None:
        require_finite(name, columns)
        moments, sizes = second_moments(columns), columns.abs().sum((0, 1))
        if name in self._moments:
            self._moments[name] += moments
            self._sizes[name] += sizes
        else:
            self._moments[name], self._sizes[name] = moments, sizes

    def _search(self, region: Region) -> Tensor | None:
        """The best factor of a region, or None where weights are best as they are."""
        known = {name: self._sizes[name] for name in region.sinks if name in self._sizes}
        sizes = per_channel(region, known)
        if not bool(sizes.any()):
            return None
        sizes = (sizes / sizes.max()).clamp(min=_LEAST)
        best, found = None, None
        for step in range(self._options.steps):
            factor = sizes.pow(step / self._options.steps)
            factor = factor / (factor.max() * factor.min()).sqrt()
            error = sum(self._error(name, factor[region.sinks[name]]) for name in known)
            if best is None or error < best:
                best, found = error, factor if step else None
        return found

    def _error(self, name: str, factor: Tensor) -> float:
        """How far outputs of a layer [batch, outputs] are off with a factor [inputs], squared."""
        weight, moments = self._layers[name].weight.detach(), self._moments[name][0]
        factor = factor.to(weight)
        wrong = (self._rounded(name, weight * factor) / factor - weight).float()
        return float((wrong @ moments * wrong).sum())
