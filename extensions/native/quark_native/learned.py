"""LearnedQuantizer: fake quantization whose scale is trained with the model (LSQ).

With q the elements and s the scale, y = q s has the gradients

    dy/dx = 1 inside the range, 0 where clipped
    dy/ds = (y - x) / s inside the range, y / s where clipped

and dy/ds is multiplied by 1 / sqrt(N max |q|), N the number of values that share the scale, so
that scales learn at the pace of weights. Esser et al. 2020, "Learned step size quantization",
arXiv 1902.08153, sections 2.1 and 2.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from quark_native.formats import Format, Parameters
from quark_native.formats.base import ElementFormat


class LearnedQuantizer(nn.Module):
    """Fake-quantizes with a trainable scale.

    Args:
        fmt: A format that takes ranges (:attr:`Format.covers`): integers or scaled floats.
        example: A tensor to start from: its min-max scale, and its zero point, which stays.

    Raises:
        ValueError: The format finds its scales itself.
    """

    scale: nn.Parameter
    zero_point: Tensor | None

    def __init__(self, fmt: Format, example: Tensor) -> None:
        super().__init__()
        if not fmt.covers or not isinstance(fmt, ElementFormat):
            raise ValueError(f"{fmt.number.name} finds its scales itself: none can be learned")
        self.format = fmt
        start = fmt.measure(example.detach().to(torch.float32))
        self.scale = nn.Parameter(start.scale.clone())
        self.register_buffer("zero_point", start.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize x: floating point, of a shape the scale fits."""
        found: Tensor = _LearnedScale.apply(x, self.scale, self.zero_point, self.format)  # type: ignore[no-untyped-call]
        return found


class _LearnedScale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: Format
    ) -> Tensor:
        parameters = Parameters(scale.detach(), zero_point)
        y = fmt.fake_quantize(x, parameters)
        ctx.format = fmt
        ctx.save_for_backward(x, y, scale, fmt.inside(x, parameters))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        x, y, scale, inside = ctx.saved_tensors
        layout, ndim = ctx.format.layout, x.ndim
        spread = layout.spread(scale, ndim)
        slope = layout.split(torch.where(inside, y - x, y).to(torch.float32)) / spread
        shared = layout.shared_axes(ndim)
        weighted = layout.split(gradient.to(torch.float32)) * slope
        total = weighted.sum(shared) if shared else weighted
        count = max(x.numel() // max(scale.numel(), 1), 1)
        largest = max(abs(end) for end in ctx.format.element_limits)
        return (
            gradient * inside,
            total.reshape(scale.shape) / math.sqrt(count * largest),
            None,
            None,
        )
