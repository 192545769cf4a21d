"""Brevitas's own code for activation equalization and algorithms, driven by the host's passes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

from torch import nn

from quark_brevitas.algorithms.columns import require_finite
from quark_brevitas.options import (
    GPFQ,
    GPTQ,
    ActivationEqualization,
    Qronos,
    accumulator_of,
)
from quark_brevitas.wrappers import show_layers
from quark_core.batch import Batch


class Stock:
    """One of Brevitas's modes: a pass over the data for each layer.

    Args:
        model: Brevitas's model, its ranges calibrated.
        options: The algorithm.
    """

    def __init__(self, model: nn.Module, options: GPTQ | GPFQ | Qronos) -> None:
        self._options = options
        self._mode = _mode(model, options)

    def passes(self) -> Iterator[str]:
        """One pass over the data a layer."""
        with self._mode as mode:
            for count in range(1, mode.num_layers + 1):
                yield f"{self._options.name} {count}/{mode.num_layers}"
                mode.update()

    def feed(self, batch: Batch) -> None:
        """Run one batch as far as the mode lets it."""
        batch.run(self._mode.model)


class StockEqualization:
    """Brevitas's activation equalization: a pass over the data, then factors.

    Args:
        model: The float model.
        paths: Where its layers are that will be quantized.
        options: How to equalize; ``layerwise`` or ``fx``.
    """

    def __init__(
        self, model: nn.Module, paths: Collection[str], options: ActivationEqualization
    ) -> None:
        from brevitas.graph.equalize import activation_equalization_mode

        self._model, self._layerwise = model, options.mode == "layerwise"
        others = [name for name, _ in model.named_modules() if name not in paths and name != ""]
        self._mode = activation_equalization_mode(
            model,
            options.alpha,
            add_mul_node=self._layerwise,
            layerwise=self._layerwise,
            blacklist_layers=others if self._layerwise else None,
        )

    def passes(self) -> Iterator[str]:
        """One pass over the data, then factors are put before layers, or folded."""
        with self._mode:
            show_layers(self._model)
            yield "activation equalization"
        show_layers(self._model)

    def feed(self, batch: Batch) -> None:
        """Run one batch.

        Brevitas keeps the largest value at each position. Those of channels are enough, and the
        next batch may have other positions.
        """
        batch.run(self._model)
        work = self._mode.graph_act_eq
        for region in work.regions:
            if self._layerwise:
                keys = [region.get_module_from_name(next(iter(region.sinks)))]
            else:
                keys = [*region.acts, *region.sinks_names]
            for key in keys:
                seen = work.float_act_map.get(key)
                if seen is not None:
                    require_finite(", ".join(region.sinks_names), seen)
                if seen is not None and region.act_axis is not None:
                    channels = region.act_axis % seen.ndim
                    others = [axis for axis in range(seen.ndim) if axis != channels]
                    found = seen.amax(others, keepdim=True) if others else seen
                    work.float_act_map[key] = found


def _mode(model: nn.Module, options: GPTQ | GPFQ | Qronos) -> Any:
    from brevitas.graph.gpfq import gpfq_mode
    from brevitas.graph.gptq import gptq_mode
    from brevitas.graph.qronos import Qronos as Implementation

    register = accumulator_of(options)
    if register is not None:
        from brevitas_examples.common.axe import a2gpfq_mode, a2gptq_mode

        mode = a2gptq_mode if isinstance(options, GPTQ) else a2gpfq_mode
        return mode(
            model,
            act_order=options.act_order,
            max_accumulator_bit_width=register.bits,
            max_accumulator_tile_size=register.tile,
        )
    if isinstance(options, GPTQ):
        return gptq_mode(
            model,
            act_order=options.act_order,
            use_quant_activations=options.quantized_inputs,
            create_weight_orig=True,
        )
    if isinstance(options, GPFQ):
        return gpfq_mode(model, act_order=options.act_order)
    return gpfq_mode(
        model,
        act_order=options.act_order,
        algorithm_impl=partial(Implementation, alpha=options.alpha),
    )
