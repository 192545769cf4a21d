"""AIMET's affine, grouped-block and floating-point quantizers.

Source: aimet-torch 2.42.0, ``aimet_torch.quantization``.

Functions take float32 and return float32 of the same shape; those that calibrate by themselves
take float16 and bfloat16 too and, like AIMET, give back the same dtype. The input is never
changed. A scale for a tensor, channels or blocks is told apart by its ``shape``, which
broadcasts against the input, and by ``block_size``, whose entry -1 is the input's length over
the shape's. AIMET's offset is minus the zero point.
"""

from __future__ import annotations

from quark_native.profiles.aimet.affine import (
    affine,
    dequantize,
    grid,
    quantize,
    quantize_dequantize,
)
from quark_native.profiles.aimet.calibration import min_max, scale_offset
from quark_native.profiles.aimet.floats import (
    float_max,
    float_quantize_dequantize,
    float_scale,
    mxfp4,
    nvfp4,
)
from quark_native.profiles.aimet.lpbq import lpbq, lpbq_scales

VERSION = "2.42.0"
"""The release of aimet-torch that the functions reproduce."""

__all__ = [
    "VERSION",
    "affine",
    "dequantize",
    "float_max",
    "float_quantize_dequantize",
    "float_scale",
    "grid",
    "lpbq",
    "lpbq_scales",
    "min_max",
    "mxfp4",
    "nvfp4",
    "quantize",
    "quantize_dequantize",
    "scale_offset",
]
