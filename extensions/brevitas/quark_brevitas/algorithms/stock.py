"""Brevitas's own code for GPTQ, GPFQ and Qronos, driven by the host's passes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from quark_brevitas.options import GPFQ, GPTQ, Qronos, accumulator_of
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
