"""The compiled kernels on CPU tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quark_native.kernels import library
from quark_native.kernels.call import Call
from quark_native.kernels.library import KINDS, ROUNDINGS, CFormat, CLayout, CPacked

if TYPE_CHECKING:
    from quark_native.formats.base import Format, Parameters
    from quark_native.formats.layout import Layout

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LARGEST_BLOCK = 2048
"""Elements of a block that the kernels hold at once."""

_PARALLEL_FROM = 1 << 16
_HUGE_PAGES_FROM = 1 << 23
"""Bytes of a fresh output from which huge pages pay: page faults cost more than the work."""
_HUGE_PAGES_TO = 1 << 26
"""Beyond, a system rarely has as many ready: some virtual machines then stop to fetch them."""
_STREAM_FROM = 1 << 25
"""Bytes of a given output from which it is written around the caches."""


def refusal(fmt: Format, call: Call | None, x: Tensor, parameters: Parameters | None) -> str | None:
    """Why the kernels do not compute this, or None if they do."""
    found, why = library.load()
    if found is None:
        return f"no compiled library: {why}"
    return format_refusal(fmt, call, x, parameters, LARGEST_BLOCK)


def format_refusal(
    fmt: Format, call: Call | None, x: Tensor, parameters: Parameters | None, largest_block: int
) -> str | None:
    """Why no kernel computes this on any device, or None if one may."""
    layout = fmt.layout
    if call is None:
        return f"no kernel for {fmt.number.name} with rounding {fmt.rounding}"
    if x.dtype not in DTYPES:
        return f"no kernel for {x.dtype}"
    if not call.given and parameters is not None:
        return f"{fmt.number.name} with scales that are given"
    if not call.given and layout.size > largest_block:
        return f"blocks of more than {largest_block} elements"
    if layout.kind == "block" and view(layout, tuple(x.shape)) is None:
        return "tiles that do not divide the tensor"
    return None


def fake_quantize(
    call: Call,
    layout: Layout,
    x: Tensor,
    parameters: Parameters | None,
    out: Tensor | None,
    seed: int,
) -> Tensor:
    """Quantize and dequantize x.

    Args:
        call: The format.
        layout: Which elements share a scale.
        x: On the CPU, of a dtype in :data:`DTYPES`.
        parameters: Scales, where the kind is given them.
        out: Where to write; contiguous, of x's shape and dtype.
        seed: Of stochastic rounding.
    """
    return Launch(call, layout, x, parameters, seed).run(x, out)


class Launch:
    """A call of the library with everything prepared that does not depend on the values.

    Args:
        call: The format.
        layout: Which elements share a scale.
        x: A tensor like those that will be quantized.
        parameters: Scales, where the kind is given them.
        seed: Of stochastic rounding.
    """

    def __init__(
        self, call: Call, layout: Layout, x: Tensor, parameters: Parameters | None, seed: int = 0
    ) -> None:
        self._run = _lib().qn_fake_quantize
        self._format, self._view = _format(call, seed), _view(layout, tuple(x.shape))
        assert self._view is not None
        self._dtype, self._bytes = DTYPES[x.dtype], x.numel() * x.element_size()
        self._parallel = x.numel() >= _PARALLEL_FROM
        self._parameters, self._versions = parameters, _versions(parameters)
        self._scale = self._extra = None
        self._pointers: tuple[int | None, int | None] = (None, None)
        if parameters is not None:
            self._scale, self._extra = scale_and_extra(call, parameters)
            extra = None if self._extra is None else self._extra.data_ptr()
            self._pointers = self._scale.data_ptr(), extra

    def fits(self, parameters: Parameters | None) -> bool:
        """Whether these are the scales it was made for, unchanged since."""
        if parameters is None:
            return self._parameters is None
        return parameters is self._parameters and _versions(parameters) == self._versions

    def run(self, x: Tensor, out: Tensor | None) -> Tensor:
        """Quantize a tensor of the same shape and dtype."""
        if not x.is_contiguous():
            x = x.contiguous()
        stream = out is not None and self._bytes >= _STREAM_FROM
        if out is None:
            out = torch.empty_like(x)
            if _HUGE_PAGES_FROM <= self._bytes <= _HUGE_PAGES_TO:
                _lib().qn_advise_huge(out.data_ptr(), self._bytes)
        self._run(
            self._format,
            self._view,
            x.data_ptr(),
            out.data_ptr(),
            *self._pointers,
            self._dtype,
            stream,
            torch.get_num_threads() if self._parallel else 1,
        )
        return out


def _versions(parameters: Parameters | None) -> tuple[int, ...]:
    """Numbers that change when scales are written to."""
    if parameters is None:
        return ()
    parts = (parameters.scale, parameters.zero_point, parameters.outer)
    return tuple(part._version for part in parts if part is not None)


def packs(call: Call | None, layout: Layout, shape: tuple[int, ...], bits: int) -> bool:
    """Whether :func:`pack` and :func:`unpack` take a tensor: MX blocks that fill the last axis."""
    if library.load()[0] is None or call is None or call.kind != "mx" or bits > 8:
        return False
    last = layout.axis % len(shape) == len(shape) - 1
    whole = shape[-1] % layout.size == 0 and layout.size % 32 == 0
    return last and whole and layout.size <= LARGEST_BLOCK


def pack(call: Call, layout: Layout, x: Tensor, bits: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bit-packed codes, and the scales' exponents counted from the smallest.

    Args:
        call: The format.
        layout: Which elements share a scale.
        x: On the CPU, of a dtype in :data:`DTYPES`, for which :func:`packs` holds.
        bits: Bits of a code.
        seed: Of stochastic rounding.

    Returns:
        uint8, one axis; uint8, the layout's compact shape.
    """
    x = x.contiguous()
    codes = torch.empty(x.numel() * bits // 8, dtype=torch.uint8)
    scales = torch.empty(layout.compact_shape(tuple(x.shape)), dtype=torch.uint8)
    packed = CPacked(x.data_ptr(), codes.data_ptr(), scales.data_ptr(), DTYPES[x.dtype], bits)
    seen = _view(layout, tuple(x.shape))
    assert seen is not None
    threads = torch.get_num_threads() if x.numel() >= _PARALLEL_FROM else 1
    _lib().qn_pack(_format(call, seed), seen, ctypes.byref(packed), threads)
    return codes, scales


def unpack(
    table: Tensor,
    scale_bias: int,
    layout: Layout,
    shape: tuple[int, ...],
    codes: Tensor,
    scales: Tensor,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """The values of what :func:`pack` made.

    Args:
        table: float32, the element of each code.
        scale_bias: The exponent of a scale whose code is 0.
        layout: Which elements share a scale.
        shape: Of the values.
        codes: uint8.
        scales: uint8.
        bits: Bits of a code.
        dtype: Of the values, one of :data:`DTYPES`.
    """
    out = torch.empty(shape, dtype=dtype)
    bytes_ = out.numel() * out.element_size()
    if _HUGE_PAGES_FROM <= bytes_ <= _HUGE_PAGES_TO:
        _lib().qn_advise_huge(out.data_ptr(), bytes_)
    codes, scales = codes.contiguous(), scales.contiguous()
    packed = CPacked(None, codes.data_ptr(), scales.data_ptr(), DTYPES[dtype], bits)
    seen = _view(layout, shape)
    assert seen is not None
    threads = torch.get_num_threads() if out.numel() >= _PARALLEL_FROM else 1
    _lib().qn_unpack(
        table.data_ptr(), scale_bias, seen, ctypes.byref(packed), out.data_ptr(), threads
    )
    return out


def _lib() -> ctypes.CDLL:
    found, why = library.load()
    if found is None:
        raise RuntimeError(f"no compiled library: {why}")
    return found


def scale_and_extra(call: Call, parameters: Parameters) -> tuple[Tensor, Tensor | None]:
    """Scales and, for the kinds that have them, zero points or thresholds; contiguous float32."""
    extra = parameters.zero_point if call.kind == "affine" else None
    if call.kind in ("ternary", "nvfp"):
        extra = parameters.outer
    if extra is not None and (extra.dtype != torch.float32 or not extra.is_contiguous()):
        extra = extra.to(torch.float32).contiguous()
    return parameters.scale.contiguous(), extra


@lru_cache(maxsize=256)
def _plain_format(call: Call) -> ctypes._CArgObject:
    return ctypes.byref(_make(call, 0))


def _format(call: Call, seed: int) -> ctypes._CArgObject:
    return ctypes.byref(_make(call, seed)) if call.rounding == "stochastic" else _plain_format(call)


def _make(call: Call, seed: int) -> CFormat:
    return CFormat(
        KINDS.index(call.kind),
        ROUNDINGS.index(call.rounding),
        call.mantissa,
        call.min_exponent,
        call.max_exponent,
        call.min_scale,
        call.max_scale,
        call.bump,
        call.low,
        call.high,
        seed,
    )


@lru_cache(maxsize=1024)
def view(layout: Layout, shape: tuple[int, ...]) -> CLayout | None:
    """A tensor as [outer, length, inner] with its blocks and scales, or None if it cannot be."""
    return _VIEWS[layout.kind](layout, shape)


@lru_cache(maxsize=1024)
def _view(layout: Layout, shape: tuple[int, ...]) -> ctypes._CArgObject | None:
    found = view(layout, shape)
    return None if found is None else ctypes.byref(found)


def _tensor(layout: Layout, shape: tuple[int, ...]) -> CLayout:
    count = torch.Size(shape).numel()
    return CLayout(1, count, 1, max(count, 1), 1, 0, 0, 0)


def _channel(layout: Layout, shape: tuple[int, ...]) -> CLayout:
    outer, length, inner = _around(layout.axis, shape)
    return CLayout(outer, length, inner, 1, 1, 0, 1, 0)


def _token(layout: Layout, shape: tuple[int, ...]) -> CLayout:
    outer, length, _ = _around(-1, shape)
    return CLayout(outer, length, 1, max(length, 1), 1, 1, 0, 0)


def _group(layout: Layout, shape: tuple[int, ...]) -> CLayout:
    outer, length, inner = _around(layout.axis, shape)
    groups = -(-length // layout.size)
    size = min(layout.size, max(length, 1))
    return CLayout(outer, length, inner, size, 1, groups * inner, inner, int(inner > 1))


def _tiles(layout: Layout, shape: tuple[int, ...]) -> CLayout | None:
    """Tiles of rows: each row has the scales of its tile, if whole tiles lie below each other."""
    if len(layout.tile) != 2:
        return None
    outer, length, _ = _around(-1, shape)
    rows = layout.tile[0]
    if len(shape) > 2 and shape[-2] % rows:
        return None
    groups = -(-length // layout.tile[1])
    return CLayout(outer, length, 1, layout.tile[1], rows, groups, 1, 0)


def _around(axis: int, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Elements before, along and behind an axis."""
    axis %= len(shape)
    before, behind = torch.Size(shape[:axis]).numel(), torch.Size(shape[axis + 1 :]).numel()
    return before, shape[axis], behind


_VIEWS: dict[str, Callable[[Layout, tuple[int, ...]], CLayout | None]] = {
    "tensor": _tensor,
    "channel": _channel,
    "token": _token,
    "group": _group,
    "block": _tiles,
}
