"""Layout: which elements of a tensor share one scale, as a reshaping and its inverse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Layout:
    """Which elements share a scale.

    A tensor is *split* so that the elements that share a scale lie along whole axes. Scales have
    two shapes: *compact*, as they are stored, and *spread*, which broadcasts against the split
    tensor.

    | kind | compact shape for x of shape [a, b, c] |
    | --- | --- |
    | tensor | [] |
    | channel, axis 1 | [b] |
    | token | [a, b] |
    | group of n, axis 1 | [a, ceil(b / n), c]; the last group may be short |

    Attributes:
        kind: As in :class:`quark_core.spec.Granularity`.
        axis: Axis of the channels or groups; negative counts from the end.
        size: Elements of a group.
    """

    kind: Literal["tensor", "channel", "token", "group"] = "tensor"
    axis: int = -1
    size: int = 1

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse a shape that has not the layout's axis.

        Raises:
            ValueError: Says which axis is missing.
        """
        if self.kind != "tensor" and not -len(shape) <= self.axis < len(shape):
            raise ValueError(f"there is no axis {self.axis} in a tensor of shape {list(shape)}")

    def split(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Reshape x so that sharing elements lie along whole axes.

        Groups get an axis of their own behind ``axis``; a short last group is padded with
        ``fill``.
        """
        self.check(tuple(x.shape))
        if self.kind != "group":
            return x
        axis = self.axis % x.ndim
        missing = -x.shape[axis] % self.size
        if missing:
            x = pad(x, [0, 0] * (x.ndim - 1 - axis) + [0, missing], value=fill)
        groups = x.shape[axis] // self.size
        return x.view(*x.shape[:axis], groups, self.size, *x.shape[axis + 1 :])

    def join(self, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Undo :meth:`split` for a tensor that had ``shape``."""
        if self.kind != "group":
            return blocks
        axis = self.axis % len(shape)
        joined = blocks.flatten(axis, axis + 1)
        if joined.shape[axis] == shape[axis]:
            return joined
        return joined.narrow(axis, 0, shape[axis]).contiguous()

    def shared_axes(self, ndim: int) -> tuple[int, ...]:
        """Axes of a split tensor along which elements share a scale.

        Args:
            ndim: Axes of the tensor before it is split.
        """
        if self.kind == "tensor":
            return tuple(range(ndim))
        if self.kind == "channel":
            return tuple(axis for axis in range(ndim) if axis != self.axis % ndim)
        if self.kind == "token":
            return (ndim - 1,)
        return (self.axis % ndim + 1,)

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest element under each scale, compact; NaN where there is a NaN.

        The padding of a short group counts as zero, which every range includes anyway.
        """
        blocks, axes = self.split(x), self.shared_axes(x.ndim)
        if not axes:  # torch takes "along no axis" for "along all"
            return blocks, blocks
        return torch.amin(blocks, axes), torch.amax(blocks, axes)

    def largest(self, x: Tensor) -> Tensor:
        """Largest magnitude under each scale, compact; NaN where there is a NaN."""
        blocks, axes = self.split(x).abs(), self.shared_axes(x.ndim)
        return torch.amax(blocks, axes) if axes else blocks

    def spread(self, compact: Tensor, ndim: int) -> Tensor:
        """A compact scale in the shape that broadcasts against a split tensor.

        Args:
            compact: One value a scale.
            ndim: Axes of the tensor before it is split.
        """
        if self.kind == "channel":
            return compact.reshape([-1] + [1] * (ndim - 1 - self.axis % ndim))
        if self.kind == "token":
            return compact.unsqueeze(-1)
        if self.kind == "group":
            return compact.unsqueeze(self.axis % ndim + 1)
        return compact
