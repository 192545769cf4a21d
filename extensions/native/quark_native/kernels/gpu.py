"""The Triton kernels on GPU tensors, or on CPU tensors under Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quark_native.kernels import cpu
from quark_native.kernels.call import Call
from quark_native.kernels.library import KINDS, ROUNDINGS

if TYPE_CHECKING:
    from quark_native.formats.base import Format, Parameters
    from quark_native.formats.layout import Layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PACKED_BITS = (4, 6, 8)
LARGEST_BLOCK = 4096
ELEMENTS_A_PROGRAM = 2048
WARPS = 4

_TUNED_FROM = 1 << 20
"""Elements from which the size of a program and its warps are found by measuring."""
_TUNED_ELEMENTS = (1024, 2048, 4096, 8192)
_TUNED_WARPS = (2, 4, 8)
_TUNED_FOR = ("KIND", "ROUNDING", "MANTISSA_BITS", "BITS", "BLOCK", "ACROSS", "WHOLE", "BF16")


def interpreted() -> bool:
    """Whether Triton's interpreter is on, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def kernels() -> Any:
    """The kernels by name, or why it cannot be imported."""
    try:
        from quark_native.kernels import triton_kernels, triton_packing
    except ImportError as error:
        return f"Triton is not installed ({error}): pip install triton"
    return {
        "blocks": triton_kernels.blocks_kernel,
        "given": triton_kernels.given_kernel,
        "pack": triton_packing.pack_kernel,
        "unpack": triton_packing.unpack_kernel,
    }


def refusal(fmt: Format, call: Call | None, x: Tensor, parameters: Parameters | None) -> str | None:
    """Why the kernels do not compute this, or None if they do."""
    device = x.device.type
    if device not in ("cuda", "xpu") and not (device == "cpu" and interpreted()):
        return f"Triton computes on GPUs, and the tensor is on {device}"
    found = kernels()
    if isinstance(found, str):
        return found
    return cpu.format_refusal(fmt, call, x, parameters, LARGEST_BLOCK)


def fake_quantize(
    call: Call,
    layout: Layout,
    x: Tensor,
    parameters: Parameters | None,
    out: Tensor | None,
    seed: int,
) -> Tensor:
    """Quantize and dequantize x; see :func:`quark_native.kernels.cpu.fake_quantize`."""
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    view = cpu.view(layout, tuple(x.shape))
    assert view is not None
    launch = _given if call.given else _blocks
    launch(call, view, x, out, parameters, seed)
    return out


def packs(call: Call | None, layout: Layout, shape: tuple[int, ...], bits: int) -> bool:
    """Whether :func:`pack` and :func:`unpack` take a tensor."""
    whole = call is not None and call.kind == "mx" and bits in PACKED_BITS
    last = layout.axis % len(shape) == len(shape) - 1
    size = layout.size
    power = size >= 4 and size & (size - 1) == 0
    return whole and last and power and shape[-1] % size == 0 and size <= LARGEST_BLOCK


def pack(call: Call, layout: Layout, x: Tensor, bits: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bit-packed codes and exponents of scales; see :func:`quark_native.kernels.cpu.pack`."""
    x, block = x.contiguous(), layout.size
    rows = x.numel() // block
    codes = torch.empty(x.numel() * bits // 8, dtype=torch.uint8, device=x.device)
    shape = layout.compact_shape(tuple(x.shape))
    scales = torch.empty(shape, dtype=torch.uint8, device=x.device)
    constants = {
        **_element(call),
        "BUMP": call.bump,
        "MIN_SCALE": call.min_scale,
        "MAX_SCALE": call.max_scale,
        "BITS": bits,
        "FIXED": call.fixed,
        "BLOCK": block,
        "BF16": x.dtype == torch.bfloat16,
    }
    arguments = (_raw(x), codes, scales, seed, rows)
    _launch("pack", block, lambda tile: -(-rows // tile), x, arguments, constants)
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
    """The values of what :func:`pack` made; see :func:`quark_native.kernels.cpu.unpack`."""
    out, block = torch.empty(shape, dtype=dtype, device=codes.device), layout.size
    rows, bf16 = out.numel() // block, dtype == torch.bfloat16
    constants = {"MIN_SCALE": scale_bias, "BITS": bits, "BLOCK": block, "BF16": bf16}
    stored = (codes.contiguous(), scales.contiguous(), table.to(codes.device))
    arguments = (*stored, _raw(out), rows)
    _launch("unpack", block, lambda tile: -(-rows // tile), out, arguments, constants)
    return out


def tile_of(width: int) -> int:
    """Blocks of a program for blocks of ``width`` elements, a power of two."""
    return max(ELEMENTS_A_PROGRAM // width, 1)


@cache
def tuned(name: str, width: int) -> Any:
    """A kernel that measures tiles and warps once for each format and dtype, and keeps the best."""
    import triton

    kernel = kernels()[name]
    choices = dict.fromkeys(
        (max(elements // width, 1), warps) for elements in _TUNED_ELEMENTS for warps in _TUNED_WARPS
    )
    return triton.autotune(
        configs=[triton.Config({"TILE": tile}, num_warps=warps) for tile, warps in choices],
        key=[key for key in _TUNED_FOR if key in kernel.arg_names],
        # An output may be the input itself, and must not be quantized again and again.
        restore_value=["out_ptr"] if "out_ptr" in kernel.arg_names else [],
    )(kernel)


def _launch(
    name: str,
    width: int,
    programs: Callable[[int], int],
    x: Tensor,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    """Run a kernel; ``programs`` says how many of them there are with a tile."""
    with _device_of(x):
        if x.numel() >= _TUNED_FROM and not interpreted():
            kernel = tuned(name, width)[lambda meta: (programs(meta["TILE"]),)]
            kernel(*arguments, **constants, enable_fp_fusion=False)
            return
        tile = tile_of(width)
        kernel = kernels()[name][(programs(tile),)]
        kernel(*arguments, **constants, TILE=tile, num_warps=WARPS, enable_fp_fusion=False)


def _element(call: Call) -> dict[str, Any]:
    return {
        "ROUNDING": ROUNDINGS.index(call.rounding),
        "MANTISSA_BITS": call.mantissa,
        "MIN_EXPONENT": call.min_exponent,
        "MAX_EXPONENT": call.max_exponent,
        "HIGH": call.high,
    }


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    if x.device.type != "cuda":
        return nullcontext()
    guard: AbstractContextManager[Any] = torch.cuda.device(x.device)
    return guard


def _raw(x: Tensor) -> Tensor:
    """The kernels convert bfloat16 themselves, alike on every device and in the interpreter."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _blocks(
    call: Call, view: Any, x: Tensor, out: Tensor, parameters: Parameters | None, seed: int
) -> None:
    block, inner = int(view.block), int(view.inner)
    across = inner > 1
    width = 1 << (block - 1).bit_length()
    groups = -(-int(view.length) // block)
    rows = int(view.outer) * groups
    outer = parameters.outer if parameters is not None else None
    constants = {
        **_element(call),
        "KIND": KINDS.index(call.kind),
        "LOW": call.low,
        "BUMP": call.bump,
        "MIN_SCALE": call.min_scale,
        "MAX_SCALE": call.max_scale,
        "BLOCK": block,
        "WIDTH": width,
        "EVEN": not across and view.length % block == 0 and width == block,
        "ACROSS": across,
        "BF16": x.dtype == torch.bfloat16,
    }
    sizes = (view.length, inner, groups, rows)
    arguments = (_raw(x), _raw(out), x if outer is None else outer, seed, *sizes)

    def programs(tile: int) -> int:
        return rows * -(-inner // tile) if across else -(-rows // tile)

    _launch("blocks", width, programs, x, arguments, constants)


def _given(
    call: Call, view: Any, x: Tensor, out: Tensor, parameters: Parameters | None, seed: int
) -> None:
    assert parameters is not None
    scale, extra = cpu.scale_and_extra(call, parameters)
    count = x.numel()
    constants = {
        **_element(call),
        "KIND": KINDS.index(call.kind),
        "LOW": call.low,
        "EXTRA": extra is not None,
        "WHOLE": scale.numel() == 1,
        "BF16": x.dtype == torch.bfloat16,
    }
    strides = (view.scale_rows, view.scale_outer, view.scale_block, view.scale_inner)
    sizes = (count, view.length, view.inner, view.block, *strides)
    scales = (scale, scale if extra is None else extra)
    arguments = (_raw(x), _raw(out), *scales, seed, *sizes)
    _launch("given", 1, lambda tile: -(-count // tile), x, arguments, constants)
