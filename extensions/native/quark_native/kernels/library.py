"""The compiled library through ctypes: csrc/library.h in Python."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_float, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path

PATH = Path(__file__).with_name("libquark_native.so")
ABI = 1

KINDS = ("affine", "scaled", "log", "binary", "ternary", "mx", "bfp", "block_log", "nvfp")
ROUNDINGS = ("nearest_even", "nearest_away", "toward_zero", "floor", "ceil", "stochastic")


class CFormat(ctypes.Structure):
    """``qn_format``."""

    _fields_ = (
        ("kind", c_int32),
        ("rounding", c_int32),
        ("mantissa", c_int32),
        ("min_exponent", c_int32),
        ("max_exponent", c_int32),
        ("min_scale", c_int32),
        ("max_scale", c_int32),
        ("bump", c_uint32),
        ("low", c_float),
        ("high", c_float),
        ("seed", c_uint64),
    )


class CLayout(ctypes.Structure):
    """``qn_layout``."""

    _fields_ = tuple(
        (name, c_int64)
        for name in (
            "outer",
            "length",
            "inner",
            "block",
            "scale_rows",
            "scale_outer",
            "scale_block",
            "scale_inner",
        )
    )


class CPacked(ctypes.Structure):
    """``qn_packed``."""

    _fields_ = (
        ("x", c_void_p),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("dtype", c_int32),
        ("bits", c_int32),
    )


@cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none.

    ``QUARK_NATIVE_ISA`` chooses an instruction set by name: avx512, avx2, sse2 or portable.
    """
    try:
        library = ctypes.CDLL(str(PATH))
    except OSError as error:
        why = str(error) if PATH.exists() else "it was not built: no C++17 compiler at installation"
        return None, why
    if library.qn_abi() != ABI:
        return None, f"{PATH} is of another version: reinstall quark-native"
    library.qn_isa.restype = ctypes.c_char_p
    library.qn_advise_huge.argtypes = (c_void_p, c_int64)
    pointers = (c_void_p,) * 6
    library.qn_fake_quantize.argtypes = (*pointers, c_int, c_int, c_int)
    library.qn_pack.argtypes = (c_void_p, c_void_p, c_void_p, c_int)
    library.qn_unpack.argtypes = (c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_int)
    wanted = os.environ.get("QUARK_NATIVE_ISA")
    if wanted and library.qn_use_isa(wanted.encode()):
        return None, f"this machine has no instruction set {wanted!r} (QUARK_NATIVE_ISA)"
    return library, library.qn_isa().decode()
