"""AWQ: channels that matter are multiplied up before quantizing (Lin et al., arXiv 2306.00978).

For a weight W [outputs, inputs] and inputs with mean magnitudes m and second moments H, factors
s = m^a for a in 0, 1/steps, ... are tried, and those with the smallest error

    trace(D H D^T),  D = Q(W s) / s - W

are kept, over sqrt(max s * min s). What comes in is divided by them at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from quark_brevitas.algorithms.columns import input_columns, plain, second_moments
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
        layers: Its Linear layers by name.
        rounded: Quantizes and dequantizes a weight with the quantizer of a layer.
        put: Puts a factor [inputs] before a layer.
        options: How many factors are tried.
        partial: Where the result is kept.
    """

    def __init__(
        self,
        model: Any,
        layers: Mapping[str, Any],
        rounded: Callable[[str, Tensor], Tensor],
        put: Callable[[str, Tensor], None],
        options: AWQ,
        partial: Partial,
    ) -> None:
        self._model, self._layers, self._rounded, self._put = model, layers, rounded, put
        self._options, self._partial = options, partial
        self._moments: dict[str, Tensor] = {}
        self._sizes: dict[str, Tensor] = {}

    def passes(self) -> Iterator[str]:
        """One pass over the data, then factors are searched and put before layers."""
        factors = self._partial.get(_KEPT)
        if factors is None:
            with ExitStack() as stack:
                for name, layer in self._layers.items():

                    def look(module: Any, args: tuple[Any, ...], name: str = name) -> None:
                        self._look(name, input_columns(module, plain(args[0])))

                    stack.callback(layer.register_forward_pre_hook(look).remove)
                yield "awq"
            factors = {
                name: factor
                for name, moments in self._moments.items()
                if (factor := self._search(name, moments[0])) is not None
            }
            self._partial.put(_KEPT, factors)
        for name, factor in factors.items():
            layer = self._layers[name]
            layer.weight = nn.Parameter(layer.weight.detach() * factor)
            self._put(name, 1 / factor)

    def feed(self, batch: Batch) -> None:
        """Run one batch."""
        batch.run(self._model)

    def _look(self, name: str, columns: Tensor) -> None:
        moments, sizes = second_moments(columns), columns.abs().sum((0, 1))
        if name in self._moments:
            self._moments[name] += moments
            self._sizes[name] += sizes
        else:
            self._moments[name], self._sizes[name] = moments, sizes

    def _search(self, name: str, moments: Tensor) -> Tensor | None:
        """The best factor of a layer, or None where weights are best as they are."""
        weight = self._layers[name].weight.detach()
        if not bool(self._sizes[name].any()):
            return None
        sizes = (self._sizes[name] / self._sizes[name].max()).clamp(min=_LEAST)
        best, found = None, None
        for step in range(self._options.steps):
            factor = sizes.pow(step / self._options.steps)
            factor = (factor / (factor.max() * factor.min()).sqrt()).to(weight.dtype)
            wrong = (self._rounded(name, weight * factor) / factor - weight).float()
            error = float((wrong @ moments * wrong).sum())
            if best is None or error < best:
                best, found = error, factor if step else None
        return found
