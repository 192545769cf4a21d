"""Layers as matrices: each computes input columns times the rows of its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from quark_core.errors import QuantizationError


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


def is_finite(x: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; its sum tells nearly always."""
    if not x.is_floating_point():
        return True
    return bool(x.sum(dtype=torch.float32).isfinite()) or bool(x.isfinite().all())


def require_finite(name: str, x: Tensor) -> None:
    """Refuse to learn from values that are not finite.

    Raises:
        QuantizationError: Names the layer that receives them.
    """
    if not is_finite(x):
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
    for axis in range(axes):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, reach, layer.stride[axis])[..., :: layer.dilation[axis]]
    # Now [samples, channels, *positions, *kernel].
    groups = groups_of(layer)
    x = torch.unflatten(x, 1, (groups, -1)).movedim(2, 2 + axes)
    columns = layer.weight[0].numel()
    return x.transpose(0, 1).reshape(groups, -1, columns)


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
