"""Which kernel computes a tensor: by device, dtype, format and layout.

The kernels are ``cpu`` (compiled, :mod:`~quark_native.kernels.cpu`), ``triton`` (GPU,
:mod:`~quark_native.kernels.gpu`) and ``torch`` (the specification itself, everywhere).
``QUARK_NATIVE_KERNEL`` in the environment of the process forces one, and so does :func:`forced`
for a while.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch import Tensor

from quark_core.errors import QuantizationError, did_you_mean
from quark_native.kernels import cpu

if TYPE_CHECKING:
    from quark_native.formats.base import Format, Parameters
    from quark_native.formats.mx import SharedExponent

Kernel = Literal["cpu", "triton", "torch"]
KERNELS: tuple[Kernel, ...] = ("cpu", "triton", "torch")

_ENVIRONMENT = os.environ.get("QUARK_NATIVE_KERNEL") or None
_LAUNCHES = 64
"""Shapes whose launches a format remembers."""

_forced: ContextVar[str | None] = ContextVar("_forced", default=None)


@dataclass(frozen=True)
class Choice:
    """A kernel, and why it is the one.

    Attributes:
        kernel: Its name.
        why: A sentence.
    """

    kernel: Kernel
    why: str


@contextmanager
def forced(kernel: Kernel) -> Iterator[None]:
    """Compute with one kernel within the block; what it cannot do is an error.

    Raises:
        QuantizationError: There is no such kernel.
    """
    _check(kernel)
    token = _forced.set(kernel)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(fmt: Format, x: Tensor, parameters: Parameters | None = None) -> Choice:
    """The kernel for a tensor.

    Raises:
        QuantizationError: One is forced that cannot compute it, or that does not exist.
    """
    wanted = _wanted()
    if wanted is not None:
        return _choose_forced(_check(wanted), fmt, x, parameters)
    usual: Kernel = "cpu" if x.device.type == "cpu" else "triton"
    reason = _refusal(usual, fmt, x, parameters)
    if reason is None:
        return Choice(usual, f"the tensor is on {x.device.type}")
    return Choice("torch", reason)


def fake_quantize(
    fmt: Format, x: Tensor, parameters: Parameters | None, out: Tensor | None, seed: int
) -> Tensor:
    """:meth:`Format.fake_quantize` by the kernel that :func:`choose` names."""
    # The way of small tensors, whose arithmetic costs less than the rest of this function.
    launch = fmt.launches.get((x.shape, x.dtype))
    if launch is not None and out is None and x.is_cpu and _wanted() is None:
        if launch.fits(parameters):
            return launch.run(x, None)
        del fmt.launches[x.shape, x.dtype]
    if not x.dtype.is_floating_point:
        raise TypeError(
            f"{fmt.number.name} quantizes floating-point tensors, not {x.dtype}: convert it first"
        )
    if out is not None:
        _check_output(x, out)
    fmt.layout.check(tuple(x.shape))
    if not x.numel():
        return x.clone() if out is None else out
    kernel = choose(fmt, x, parameters).kernel
    if kernel == "torch":
        found = fmt.specification(x, parameters, seed)
        return found if out is None else out.copy_(found)
    call = fmt.call()
    assert call is not None
    if parameters is not None:
        _check_scales(fmt, x, parameters)
    lasting = call.rounding != "stochastic" and call.given == (parameters is not None)
    if call.given and parameters is None:
        parameters = fmt.measure(x.to(torch.float32))
    elif not call.given:
        parameters = fmt.outer_parameters(x)
    if kernel == "cpu":
        launch = cpu.Launch(call, fmt.layout, x, parameters, seed)
        if lasting and call.kind != "nvfp":
            if len(fmt.launches) >= _LAUNCHES:
                fmt.launches.clear()
            fmt.launches[x.shape, x.dtype] = launch
        return launch.run(x, out)
    from quark_native.kernels import gpu

    return gpu.fake_quantize(call, fmt.layout, x, parameters, out, seed)


def pack(fmt: Format, x: Tensor, seed: int = 0) -> tuple[Tensor, Tensor] | None:
    """Codes and scales as a kernel packs them, or None where none does."""
    engine = _packer(fmt, choose(fmt, x).kernel, tuple(x.shape))
    call = fmt.call()
    if engine is None or call is None:
        return None
    packed: tuple[Tensor, Tensor] = engine.pack(call, fmt.layout, x, fmt.number.bits, seed)
    return packed


def unpack(
    fmt: Format, shape: tuple[int, ...], codes: Tensor, scales: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """The values of packed codes as a kernel finds them, or None where none does."""
    usual = "cpu" if codes.device.type == "cpu" else "triton"
    engine = _packer(fmt, _wanted() or usual, shape)
    if engine is None or not _is_shared(fmt) or dtype not in cpu.DTYPES:
        return None
    table, bias = fmt.code_table(), fmt.scale_limits[0]
    bits = fmt.number.bits
    values: Tensor = engine.unpack(table, bias, fmt.layout, shape, codes, scales, bits, dtype)
    return values


def _packer(fmt: Format, kernel: str, shape: tuple[int, ...]) -> Any:
    """The module that packs a format, or None."""
    if not _is_shared(fmt) or kernel == "torch":
        return None
    engine = cpu if kernel == "cpu" else _gpu()
    return engine if engine.packs(fmt.call(), fmt.layout, shape, fmt.number.bits) else None


def _is_shared(fmt: Format) -> TypeGuard[SharedExponent]:
    from quark_native.formats.mx import SharedExponent

    return isinstance(fmt, SharedExponent)


def _gpu() -> Any:
    from quark_native.kernels import gpu

    return gpu


def _wanted() -> str | None:
    return _forced.get() or _ENVIRONMENT


def _refusal(kernel: Kernel, fmt: Format, x: Tensor, parameters: Parameters | None) -> str | None:
    if kernel == "torch":
        return None
    if kernel == "cpu":
        if x.device.type != "cpu":
            return f"the tensor is on {x.device.type}"
        return cpu.refusal(fmt, fmt.call(), x, parameters)
    from quark_native.kernels import gpu

    return gpu.refusal(fmt, fmt.call(), x, parameters)


def _choose_forced(kernel: Kernel, fmt: Format, x: Tensor, parameters: Parameters | None) -> Choice:
    reason = _refusal(kernel, fmt, x, parameters)
    if reason is not None:
        raise QuantizationError(
            f"kernel {kernel} cannot compute {fmt.number.name}: {reason}",
            fix="Take QUARK_NATIVE_KERNEL out of the environment, or do not force a kernel here",
        )
    return Choice(kernel, "it is forced")


def _check(kernel: str) -> Kernel:
    for known in KERNELS:
        if kernel == known:
            return known
    raise QuantizationError(
        f"there is no kernel {kernel!r} (QUARK_NATIVE_KERNEL)",
        fix=did_you_mean(kernel, KERNELS) or f"Kernels are {', '.join(KERNELS)}",
    )


def _check_scales(fmt: Format, x: Tensor, parameters: Parameters) -> None:
    """Kernels read memory by address: it must be there, and enough of it."""
    expected = fmt.layout.compact_shape(tuple(x.shape))
    count = torch.Size(expected).numel()
    for part in (parameters.scale, parameters.zero_point, parameters.outer):
        if part is not None and part is not parameters.outer and part.numel() != count:
            raise ValueError(
                f"{fmt.number.name} has {part.numel()} scales, and a tensor of shape "
                f"{list(x.shape)} needs {count}, as {list(expected)}"
            )
        if part is not None and part.device != x.device:
            raise ValueError(f"the scales are on {part.device}, and the tensor is on {x.device}")


def _check_output(x: Tensor, out: Tensor) -> None:
    fits = out.shape == x.shape and out.dtype == x.dtype and out.device == x.device
    if not fits or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous, of shape {list(x.shape)}, {x.dtype}, on {x.device}; it is "
            f"of shape {list(out.shape)}, {out.dtype}, on {out.device}"
        )
