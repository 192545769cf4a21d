"""Layers as matrices: each computes input columns times the rows of its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from quark_core.errors import QuantizationError

_UNFOLD_AXES = 2
"""Axes that torch's unfold knows."""


def plain(value: Any) -> Tensor:
    """The tensor in what a layer receives, which with fx is one of Brevitas's own."""
    tensor: Tensor = value if type(value) is Tensor else getattr(value, "value", value)
    return tensor


def input_of(name: str, args: tuple[Any, ...]) -> Tensor:
    """What a layer was called with, as hooks are told.

    Raises:
        QuantizationError: It was called by keyword, which hooks of Brevitas do not see either.
    """
    if not args:
        raise QuantizationError(
            "the model calls the layer by keyword, where nothing can look at its input",
            where=f"layer {name!r}",
            fix="Call it by position in the model's forward: layer(x) instead of layer(input=x)",
        )
    return plain(args[0])


def require_finite(name: str, x: Tensor) -> None:
    """Refuse to learn from values that are not finite.

    Raises:
        QuantizationError: Names the layer that receives them.
    """
    if x.is_floating_point() and not bool(x.isfinite().all()):
        raise QuantizationError(
            "the layer receives values that are not finite",
            where=f"layer {name!r}",
            fix="Look for infinite values in the calibration data and in weights",
        )


def groups_of(layer: Any) -> int:
    """Groups of a convolution; 1 for other layers."""
    return int(getattr(layer, "groups", 1))


def input_columns(layer: Any, x: Tensor) -> Tensor:
    """What the rows of a weight are multiplied with: [groups, positions, columns], float32.

    Args:
        layer: A Linear, or a convolution over one to three axes.
        x: Its input, with or without a batch axis.
    """
    x = x.detach().float()
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    axes = len(layer.kernel_size)
    if x.ndim == axes + 1:
        x = x.unsqueeze(0)
    padding = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = pad(x, padding, mode=mode)
    unfolded = _windows(layer, x)
    groups = groups_of(layer)
    samples, columns, positions = unfolded.shape
    split = unfolded.view(samples, groups, columns // groups, positions)
    return split.permute(1, 0, 3, 2).reshape(groups, samples * positions, columns // groups)


def _windows(layer: Any, x: Tensor) -> Tensor:
    """What a convolution multiplies at each position: [samples, columns, positions]."""
    axes = len(layer.kernel_size)
    if axes > _UNFOLD_AXES:
        for axis, (size, step, apart) in enumerate(
            zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
        ):
            x = x.unfold(axis, apart * (size - 1) + 1, step)[..., ::apart]
        # Channels, then the kernel's axes, as in a weight's row; positions stand in between.
        x = x.movedim(tuple(range(2, 2 + axes)), tuple(range(-axes, 0)))
        return x.flatten(2 + axes).flatten(1, 1 + axes)
    if axes == 1:
        x = x.unsqueeze(2)
    front = (1,) * (_UNFOLD_AXES - axes)
    return unfold(
        x,
        (*front, *layer.kernel_size),
        dilation=(*front, *layer.dilation),
        stride=(*front, *layer.stride),
    )


def weight_rows(weight: Tensor, groups: int) -> Tensor:
    """A weight as [groups, rows, columns], float32; a copy."""
    return weight.detach().float().clone().reshape(groups, weight.shape[0] // groups, -1)


def second_moments(columns: Tensor, others: Tensor | None = None) -> Tensor:
    """Sum over positions of columns times columns: [groups, columns, columns]."""
    return torch.bmm(columns.transpose(1, 2), columns if others is None else others)


def largest_eigenvalue(moments: Tensor) -> Tensor:
    """The matrix norm of second moments, in a third of the time of singular values."""
    largest: Tensor = torch.linalg.eigvalsh(moments)[-1]
    return largest
