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
    | block of m x n | [a, ceil(b / m), ceil(c / n)]; the last tiles may be short |

    Attributes:
        kind: As in :class:`quark_core.spec.Granularity`.
        axis: Axis of the channels or groups; negative counts from the end.
        size: Elements of a group.
        tile: Sides of a block, along the last axes.
    """

    kind: Literal["tensor", "channel", "token", "group", "block"] = "tensor"
    axis: int = -1
    size: int = 1
    tile: tuple[int, ...] = ()

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse a shape that has not the layout's axis.

        Raises:
            ValueError: Says which axis is missing.
        """
        if self.kind == "block" and len(shape) < len(self.tile):
            tile = "x".join(map(str, self.tile))
            raise ValueError(f"there are no tiles of {tile} in a tensor of shape {list(shape)}")
        axial = self.kind not in ("tensor", "block")
        if axial and not -len(shape) <= self.axis < len(shape):
            raise ValueError(f"there is no axis {self.axis} in a tensor of shape {list(shape)}")

    def sides(self, ndim: int) -> dict[int, int]:
        """Length of a run of sharing elements by axis, for the kinds that split axes."""
        if self.kind == "group":
            return {self.axis % ndim: self.size}
        return {ndim - len(self.tile) + place: side for place, side in enumerate(self.tile)}

    def split(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Reshape x so that sharing elements lie along whole axes.

        Groups and the sides of tiles get an axis of their own behind the one they divide; short
        last ones are padded with ``fill``.
        """
        self.check(tuple(x.shape))
        sides = self.sides(x.ndim)
        missing = {axis: -x.shape[axis] % side for axis, side in sides.items()}
        if any(missing.values()):
            ends = ([0, missing.get(axis, 0)] for axis in reversed(range(x.ndim)))
            x = pad(x, [amount for end in ends for amount in end], value=fill)
        for axis in sorted(sides, reverse=True):
            runs = (x.shape[axis] // sides[axis], sides[axis])
            x = x.reshape(*x.shape[:axis], *runs, *x.shape[axis + 1 :])
        return x

    def join(self, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Undo :meth:`split` for a tensor that had ``shape``."""
        padded = False
        for axis in sorted(self.sides(len(shape))):
            blocks = blocks.flatten(axis, axis + 1)
            if blocks.shape[axis] != shape[axis]:
                blocks, padded = blocks.narrow(axis, 0, shape[axis]), True
        return blocks.contiguous() if padded else blocks

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
        return tuple(axis + place + 1 for place, axis in enumerate(sorted(self.sides(ndim))))

    def compact_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a tensor of ``shape``."""
        self.check(shape)
        sides = self.sides(len(shape))
        if sides:
            return tuple(-(-size // sides.get(axis, 1)) for axis, size in enumerate(shape))
        shared = self.shared_axes(len(shape))
        return tuple(size for axis, size in enumerate(shape) if axis not in shared)

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
        low, high = self.extremes(x)
        return torch.maximum(high.abs(), low.abs())

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
        for axis in sorted(self.sides(ndim), reverse=True):
            compact = compact.unsqueeze(axis + 1)
        return compact
