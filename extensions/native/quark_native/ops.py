"""Fake quantization as a torch operator, with its gradients.

``torch.ops.quark_native.fake_quantize`` is what torch.compile and torch.export see of a format: an
operator with a shape rule and a gradient, whose format travels as text. Eager code calls the
kernels directly instead, since going through the operator costs more than a small tensor's
arithmetic.

The gradient is straight-through: 1 for what is rounded, 0 for what is clipped to the smallest or
largest representable value; with scales measured from the tensor itself it is 1 everywhere.
Bengio et al. 2013, "Estimating or propagating gradients through stochastic neurons".
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quark_native.formats import Format, Parameters


def fake_quantize(
    x: Tensor, fmt: Format, parameters: Parameters | None = None, seed: int = 0
) -> Tensor:
    """:meth:`Format.fake_quantize` with a straight-through gradient, seen by compilers.

    Args:
        x: Floating point.
        fmt: The format.
        parameters: Scales to use; None measures the tensor.
        seed: Of stochastic rounding.
    """
    if torch.compiler.is_compiling() or type(x) not in _PLAIN:
        return _through_operator(x, fmt, parameters, seed)
    if torch.is_grad_enabled() and x.requires_grad:
        return _StraightThrough.apply(x, fmt, parameters, seed)  # type: ignore[no-any-return, no-untyped-call]
    return fmt.fake_quantize(x, parameters, seed=seed)


_PLAIN = (Tensor, torch.nn.Parameter)
"""What the kernels may read by address; subclasses may have no memory of their own."""


class _StraightThrough(torch.autograd.Function):
    """The gradient of the module's description, for eager code."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fmt: Format, parameters: Parameters | None, seed: int
    ) -> Tensor:
        if parameters is not None:
            ctx.save_for_backward(fmt.inside(x, parameters))
        return fmt.fake_quantize(x, parameters, seed=seed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        if ctx.saved_tensors:
            gradient = gradient * ctx.saved_tensors[0]
        return gradient, None, None, None


# The operator.


def _through_operator(x: Tensor, fmt: Format, parameters: Parameters | None, seed: int) -> Tensor:
    if fmt.spelling is None:
        raise ValueError(f"{fmt} was not made from a spec: make it by Format.parse")
    text, axis, profile = fmt.spelling
    scale = zero_point = outer = None
    if parameters is not None:
        scale, zero_point, outer = parameters.scale, parameters.zero_point, parameters.outer
    found: Tensor = _operator(x, text, axis, profile, scale, zero_point, outer, seed)
    return found


@torch.library.custom_op("quark_native::fake_quantize", mutates_args=())
def _operator(
    x: Tensor,
    spec: str,
    axis: int | None,
    profile: str,
    scale: Tensor | None,
    zero_point: Tensor | None,
    outer: Tensor | None,
    seed: int,
) -> Tensor:
    parameters = None if scale is None else Parameters(scale, zero_point, outer)
    found = _format(spec, axis, profile).fake_quantize(x, parameters, seed=seed)
    return found.clone() if found.data_ptr() == x.data_ptr() else found


@_operator.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, spec, axis, profile, scale, zero_point, outer, _ = inputs
    ctx.made = (spec, axis, profile)
    ctx.save_for_backward(*(() if scale is None else (x, scale, zero_point, outer)))


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.saved_tensors:
        x, scale, zero_point, outer = ctx.saved_tensors
        inside = _format(*ctx.made).inside(x, Parameters(scale, zero_point, outer))
        gradient = gradient * inside
    return gradient, *(None for _ in range(7))


_operator.register_autograd(_backward, setup_context=_setup_context)


@lru_cache(maxsize=1024)
def _format(spec: str, axis: int | None, profile: str) -> Format:
    return Format.parse(spec, role="output", axis=axis, profile=profile)
