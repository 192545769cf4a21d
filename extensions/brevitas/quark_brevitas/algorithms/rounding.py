"""Rounding a model's layers one step after the other with what their inputs look like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from quark_brevitas.algorithms import accumulate, solve
from quark_brevitas.algorithms.columns import (
    groups_of,
    input_columns,
    plain,
    second_moments,
    weight_rows,
)
from quark_brevitas.algorithms.grid import Grid
from quark_brevitas.algorithms.kept import Kept
from quark_brevitas.algorithms.walk import Step, Walk, same_rows
from quark_brevitas.options import GPFQ, GPTQ, TWO_STREAMS, Qronos, accumulator_of
from quark_brevitas.preparation import keep_float_weights
from quark_core.batch import Batch
from quark_core.partial import Partial
from quark_core.plan import PlanEntry

QUANTIZED, FLOAT = "quantized", "float"


class Rounding:
    """GPTQ, GPFQ or Qronos over the layers of a prepared model.

    Args:
        model: Brevitas's model, its ranges calibrated.
        layers: Layers by their name in the plan.
        entries: Their entries.
        options: The algorithm.
        example: One batch.
        partial: Where finished steps are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Any],
        entries: Mapping[str, PlanEntry],
        options: GPTQ | GPFQ | Qronos,
        example: Batch,
        partial: Partial | None = None,
    ) -> None:
        self._model, self._layers, self._entries, self._options = model, layers, entries, options
        self._kept = Kept(partial or Partial(), options.name)
        self._two = options.name in TWO_STREAMS
        self._quantized_inputs = self._two or getattr(options, "quantized_inputs", False)
        self._step: Step | None = None
        self._index = 0
        self._moments: Tensor | None = None
        self._mixed: Tensor | None = None
        self._float = FloatMode(model)
        keep_float_weights(layers)
        with self._inputs_as_wanted():
            keys = {name: self._key(name) for name in layers}
            self._walk = Walk(model, layers, keys, example)

    def passes(self) -> Iterator[str]:
        """One pass over the data a step, then its layers are rounded."""
        steps = self._walk.steps
        with self._inputs_as_wanted(), _Finished() as finished:
            for count, step in enumerate(steps, start=1):
                layers = {name: self._layers[name] for name in step.layers}
                known = self._kept.read(count, layers)
                if not known:
                    self._step, self._index, self._moments, self._mixed = step, 0, None, None
                    yield f"{self._options.name} {count}/{len(steps)}"
                self._walk.finish(step)
                finished.release(step.block)
                for name, layer in layers.items():
                    if not known:
                        self._round(name)
                    finished.hold(layer, step.block)
                if not known:
                    self._kept.write(count, layers)

    @property
    def notes(self) -> list[str]:
        """What the user should hear."""
        return self._walk.missed(self._layers)

    def feed(self, batch: Batch) -> None:
        """Run one batch up to the step under way."""
        assert self._step is not None
        wanted: list[Tensor] = []
        quantized = self._walk.run(self._step, batch, self._index, QUANTIZED)
        if self._two:
            with self._float:
                wanted = self._walk.run(self._step, batch, self._index, FLOAT)
        self._index += 1
        for x, target in zip_longest(quantized, wanted[: len(quantized)]):
            self._collect(x, target)

    def _collect(self, given: Tensor, wanted: Tensor | None) -> None:
        assert self._step is not None
        layer = self._layers[self._step.layers[0]]
        x = given
        if self._quantized_inputs:
            x = plain(layer.input_quant(x))
        columns = input_columns(layer, x)
        moments = second_moments(columns)
        self._moments = moments if self._moments is None else self._moments.add_(moments)
        if self._two:
            rows = same_rows(given, wanted)
            mixed = second_moments(columns, input_columns(layer, rows))
            self._mixed = mixed if self._mixed is None else self._mixed.add_(mixed)

    def _round(self, name: str) -> None:
        layer, spec = self._layers[name], self._entries[name].weight
        assert spec is not None
        if self._moments is None:
            return  # no batch reached it
        grid = Grid.of(layer, spec)
        groups = groups_of(layer)
        weights = weight_rows(layer.weight, groups)
        size = weights.shape[1]
        rounded = [
            self._solve(name, weights[at], at, grid, slice(at * size, (at + 1) * size))
            for at in range(groups)
        ]
        found = torch.stack(rounded).reshape(layer.weight.shape)
        layer.weight.data.copy_(found)

    def _solve(self, name: str, weight: Tensor, group: int, grid: Grid, rows: slice) -> Tensor:
        options, register = self._options, accumulator_of(self._options)
        inputs, limit = self._entries[name].input, None
        if register is not None and inputs is not None:
            limit = accumulate.limit(weight, grid, rows, accumulate.input_codes(inputs), register)
        assert self._moments is not None
        moments = self._moments[group]
        if isinstance(options, GPTQ):
            return solve.gptq(
                weight,
                moments,
                grid,
                rows,
                act_order=options.act_order,
                damping=options.damping,
                limit=limit,
            )
        assert self._mixed is not None
        mixed = self._mixed[group]
        if isinstance(options, GPFQ):
            return solve.gpfq(
                weight, moments, mixed, grid, rows, act_order=options.act_order, limit=limit
            )
        return solve.qronos(
            weight,
            moments,
            mixed,
            grid,
            rows,
            act_order=options.act_order,
            alpha=options.alpha,
        )

    def _inputs_as_wanted(self) -> Any:
        """Quantized layers before a step see float inputs, unless the options say otherwise."""
        return ExitStack() if self._quantized_inputs else FloatMode(self._model, weights=False)

    def _key(self, name: str) -> object:
        layer = self._layers[name]
        geometry = [
            str(getattr(layer, part, None))
            for part in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        ]
        return str(self._entries[name].input) if self._quantized_inputs else "", *geometry


class _Finished:
    """Rounded layers, whose quantized weights are kept while the layers run again and again."""

    def __init__(self) -> None:
        self._held: list[tuple[int, Any]] = []

    def __enter__(self) -> _Finished:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def hold(self, layer: Any, block: int) -> None:
        """Quantize a layer's weight for the last time."""
        proxy, quantized = layer.weight_quant, layer.quant_weight()
        proxy.forward = lambda weight: quantized if proxy.is_quant_enabled else weight
        self._held.append((block, proxy))

    def release(self, block: int | None = None) -> None:
        """Forget those of blocks before ``block``, which will not run again, or all."""
        kept = []
        for held, proxy in self._held:
            if block is None or held < block:
                del proxy.forward
            else:
                kept.append((held, proxy))
        self._held = kept


class FloatMode:
    """Lets a model compute as the float one for a while, with its original weights.

    Brevitas's own manager looks through the whole model several times whenever it is entered or
    left, which for a batch of text takes longer than running it.

    Args:
        model: The model.
        weights: Whether weights are the original ones, too.
    """

    def __init__(self, model: nn.Module, *, weights: bool = True) -> None:
        from brevitas.proxy.parameter_quant import WeightQuantProxyFromInjectorBase

        modules: list[Any] = list(model.modules())
        self._proxies = [
            module
            for module in modules
            if hasattr(module, "disable_quant")
            and (weights or not isinstance(module, WeightQuantProxyFromInjectorBase))
        ]
        self._layers = [module for module in modules if hasattr(module, "return_quant_tensor")]
        self._before: list[tuple[Any, str, bool]] = []

    def __enter__(self) -> None:
        for modules, name, wanted in (
            (self._proxies, "disable_quant", True),
            (self._layers, "return_quant_tensor", False),
        ):
            for module in modules:
                self._before.append((module, name, getattr(module, name)))
                setattr(module, name, wanted)

    def __exit__(self, *_: object) -> None:
        for module, name, value in self._before:
            setattr(module, name, value)
        self._before.clear()
