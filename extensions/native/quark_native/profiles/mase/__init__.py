"""MASE's quantizers, under MASE's parameter names.

Source: MASE (DeepWok/mase), checkout 6ff398c of 2026-04-23, ``chop.nn.quantizers``.

Every function takes a float32 tensor, leaves it unchanged, and returns float32 of the same shape
(:func:`residual_sign` stacks its levels in front). Exponents come from a float32 log2 as MASE's
do, so values within a rounding error of a power of two can land one binade off, as MASE's do.
"""

from __future__ import annotations

from quark_native.profiles.mase.binary import binary, residual_sign, ternary
from quark_native.profiles.mase.blocks import block_fp, block_log, block_minifloat
from quark_native.profiles.mase.elements import minifloat_mx
from quark_native.profiles.mase.elementwise import (
    integer,
    integer_floor,
    log,
    minifloat_denorm,
    minifloat_ieee,
    scale_integer,
)
from quark_native.profiles.mase.mx import mxfp, mxint, mxint_hardware

VERSION = "6ff398c (2026-04-23)"
"""The checkout that the functions reproduce; MASE has no releases that carry these quantizers."""

__all__ = [
    "VERSION",
    "binary",
    "block_fp",
    "block_log",
    "block_minifloat",
    "integer",
    "integer_floor",
    "log",
    "minifloat_denorm",
    "minifloat_ieee",
    "minifloat_mx",
    "mxfp",
    "mxint",
    "mxint_hardware",
    "residual_sign",
    "scale_integer",
    "ternary",
]
