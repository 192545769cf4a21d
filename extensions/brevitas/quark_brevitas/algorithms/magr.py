"""MagR: smaller weights with nearly the same outputs (Zhang et al. 2024, arXiv 2406.00800).

For each row w of a weight, with H the second moments of the layer's inputs, proximal gradient
steps on

    1/2 (w - w0) H (w - w0)^T + alpha max |w|

where the proximal step of the largest magnitude is x minus its projection onto an l1 ball.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from quark_brevitas.algorithms.balls import l1_cut
from quark_brevitas.algorithms.columns import (
    groups_of,
    input_columns,
    input_of,
    largest_eigenvalue,
    require_finite,
    second_moments,
    weight_rows,
)
from quark_brevitas.algorithms.kept import Kept
from quark_brevitas.options import MagR
from quark_core.batch import Batch
from quark_core.partial import Partial


class Shrinking:
    """MagR over the float layers of a model.

    Args:
        model: The float model.
        layers: Its layers by name.
        options: Weight of the penalty, and steps.
        partial: Where its result is kept.
    """

    def __init__(
        self,
        model: Any,
        layers: Mapping[str, Any],
        options: MagR,
        partial: Partial | None = None,
    ) -> None:
        self._model, self._layers, self._options = model, layers, options
        self._kept = Kept(partial or Partial(), "magr")
        self._moments: dict[str, Tensor] = {}

    def passes(self) -> Iterator[str]:
        """One pass over the data, then all weights are changed."""
        if self._kept.read(1, self._layers):
            return
        with ExitStack() as stack:
            for name, layer in self._layers.items():

                def look(module: Any, args: tuple[Any, ...], name: str = name) -> None:
                    x = input_of(name, args)
                    require_finite(name, x)
                    found = second_moments(input_columns(module, x))
                    known = self._moments.get(name)
                    self._moments[name] = found if known is None else known.add_(found)

                stack.callback(layer.register_forward_pre_hook(look).remove)
            yield "magr"
        for name, moments in self._moments.items():
            layer = self._layers[name]
            weights = weight_rows(layer.weight, groups_of(layer))
            shrunk = [
                _shrink(weight, moments[at], self._options) for at, weight in enumerate(weights)
            ]
            layer.weight.data.copy_(torch.stack(shrunk).reshape(layer.weight.shape))
        self._kept.write(1, self._layers)

    def feed(self, batch: Batch) -> None:
        """Run one batch."""
        batch.run(self._model)


def _shrink(weight: Tensor, moments: Tensor, options: MagR) -> Tensor:
    largest = largest_eigenvalue(moments)
    if largest <= 0:
        return weight
    step = 1 / largest
    penalty = options.alpha / (step * torch.linalg.matrix_norm(moments, ord=1))
    found = weight
    for _ in range(options.steps):
        moved = found - step * (found - weight) @ moments
        found = moved - penalty * _onto_l1_ball(moved / penalty)
    return found


def _onto_l1_ball(rows: Tensor) -> Tensor:
    """Each row, or the nearest point of the unit l1 ball if it lies outside."""
    sizes = rows.abs()
    return rows.sign() * (sizes - l1_cut(sizes, 1.0)).clamp_(min=0)
