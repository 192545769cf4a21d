"""Quantizers of biases."""

from __future__ import annotations

from brevitas.quant.scaled_int import Int16Bias, Int32Bias

from quark_brevitas.quantizers.parts import Quantizer
from quark_core.spec import TensorSpec

_BIASES: dict[str, Quantizer] = {"int16": Int16Bias, "int32": Int32Bias}


def bias_quantizer(spec: TensorSpec | None) -> Quantizer | None:
    """Brevitas's quantizer for a bias spec; its scale is input scale times weight scale."""
    return None if spec is None else _BIASES[spec.format]
