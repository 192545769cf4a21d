"""Specs under the names ExecuTorch's own configurations have, for use in Python.

They differ from what a recipe says by default in one thing: ranges come from the histogram
observer (``mse``), as in ExecuTorch.
"""

from __future__ import annotations

from typing import Any


def int8(*, per_channel: bool = True) -> dict[str, Any]:
    """8-bit activations and weights, as ``get_symmetric_quantization_config``."""
    return _scheme("int8", "int8/mse", per_channel)


def a16w8(*, per_channel: bool = True) -> dict[str, Any]:
    """16-bit activations, 8-bit weights, as ``get_symmetric_a16w8_quantization_config``."""
    return _scheme("int8", "int16/sym/mse", per_channel)


def a8w4(*, per_channel: bool = True) -> dict[str, Any]:
    """8-bit activations, 4-bit weights, as ``get_symmetric_a8w4_quantization_config``."""
    return _scheme("int4", "int8/mse", per_channel)


def uint8_io() -> dict[str, Any]:
    """Unsigned bytes at the model's ends, as ``get_uint8_io_quantization_config``."""
    return {"weight": None, "input": "uint8/mse", "output": "uint8/mse"}


def _scheme(weight: str, activation: str, per_channel: bool) -> dict[str, Any]:
    granularity = "channel" if per_channel else "tensor"
    return {"weight": f"{weight}/{granularity}", "input": activation, "output": activation}
