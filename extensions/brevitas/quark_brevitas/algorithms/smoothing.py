"""SmoothQuant folded into the model (Xiao et al., arXiv 2211.10438), over recorded regions.

For channel c, with largest magnitudes x of what comes in and w of the columns that read it,

    s = x^alpha / w^(1 - alpha)

divides what the norm or layer before writes, and multiplies the columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from quark_brevitas.algorithms.columns import input_of, require_finite
from quark_brevitas.fusing import Region, fold, per_channel
from quark_core.batch import Batch
from quark_core.partial import Partial

_KEPT = "smoothing"
_NOTHING = 1e-9


class Smoothing:
    """Activation equalization over regions.

    Args:
        model: The float model.
        regions: Where factors can be folded.
        quantized: The layers that will be quantized, by name; only these have a say.
        alpha: How much moves from inputs into weights.
        partial: Where the ranges are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        regions: Sequence[Region],
        quantized: Mapping[str, Any],
        alpha: float,
        partial: Partial,
    ) -> None:
        self._model, self._regions, self._alpha = model, regions, alpha
        self._layers = {
            name: quantized[name]
            for region in regions
            for name in region.sinks
            if name in quantized
        }
        self._partial = partial
        self._largest: dict[str, Tensor] = {}

    def passes(self) -> Iterator[str]:
        """One pass over the data, then factors are folded."""
        known = self._partial.get(_KEPT)
        if known is None:
            with ExitStack() as stack:
                for name, layer in self._layers.items():

                    def look(_module: Any, args: tuple[Any, ...], name: str = name) -> None:
                        self._look(name, input_of(name, args))

                    stack.callback(layer.register_forward_pre_hook(look).remove)
                yield "activation equalization"
            known = self._largest
            self._partial.put(_KEPT, known)
        for region in self._regions:
            names = [name for name in region.sinks if name in known]
            inputs = per_channel(region, {name: known[name] for name in names})
            columns = {name: self._layers[name].weight.abs().amax(0) for name in names}
            fold(self._model, region, self._factor(inputs, per_channel(region, columns)))

    def feed(self, batch: Batch) -> None:
        """Run one batch."""
        batch.run(self._model)

    def _look(self, name: str, x: Tensor) -> None:
        require_finite(name, x)
        largest = x.detach().abs().flatten(0, -2).amax(0).float()
        known = self._largest.get(name)
        self._largest[name] = largest if known is None else torch.maximum(known, largest)

    def _factor(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """One where a channel, or what reads it, is nothing but zero."""
        factor = inputs.pow(self._alpha) / weights.pow(1 - self._alpha)
        return torch.where((inputs > _NOTHING) & (weights > _NOTHING), factor, 1.0)
