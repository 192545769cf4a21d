"""Quantized modules."""

from __future__ import annotations

from quark_native.nn.layer import QuantizedLayer
from quark_native.nn.layers import (
    OPS,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedEmbedding,
    QuantizedLinear,
    layer_format,
    quantized_class,
)

__all__ = [
    "OPS",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConvTranspose1d",
    "QuantizedConvTranspose2d",
    "QuantizedEmbedding",
    "QuantizedLayer",
    "QuantizedLinear",
    "layer_format",
    "quantized_class",
]
