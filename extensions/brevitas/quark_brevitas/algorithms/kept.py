"""Finished steps of an algorithm, kept so that a run that was cut short need not repeat them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quark_brevitas.algorithms.choices import scale_parameter
from quark_core.partial import Partial


class Kept:
    """The finished weights of one algorithm, step by step.

    Steps are read back from the first on. The first that is missing, or that does not fit its
    layers, ends that: all after it are done again.

    Args:
        partial: Where they are kept.
        algorithm: The name they are kept under.
        scales: Whether the algorithm changes scales too.
    """

    def __init__(self, partial: Partial, algorithm: str, *, scales: bool = False) -> None:
        self._partial, self._algorithm, self._scales = partial, algorithm, scales
        self._reading = True

    def read(self, step: object, layers: Mapping[str, Any]) -> bool:
        """Give layers the weights that were kept for a step; whether there were any."""
        found = self._partial.get(f"{self._algorithm}/{step}") if self._reading else None
        tensors = self._tensors(layers)
        self._reading = found is not None and all(
            name in found and found[name].shape == tensor.shape for name, tensor in tensors.items()
        )
        if not self._reading or found is None:
            return False
        with torch.no_grad():
            for layer in layers.values():
                if hasattr(layer, "quant_weight"):
                    layer.quant_weight()  # scales are the float weight's, which goes now
            for name, tensor in tensors.items():
                tensor.copy_(found[name])
        return True

    def write(self, step: object, layers: Mapping[str, Any]) -> None:
        """Keep the weights of a step's layers, which are final."""
        self._partial.put(f"{self._algorithm}/{step}", self._tensors(layers))

    def _tensors(self, layers: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        found = {f"{name}.weight": layer.weight for name, layer in layers.items()}
        if self._scales:
            for name, layer in layers.items():
                layer.quant_weight()  # scales are known once it has been asked for
                found[f"{name}.scale"] = scale_parameter(layer)
        return found
