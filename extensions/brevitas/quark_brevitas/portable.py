"""Rotations at run time as exporters can hold them.

Brevitas writes into views of its input and reads its matrices from a file on each call, which
torch.export refuses and ONNX answers with thousands of nodes. Here each step of the transform makes
a new tensor; sums are the same, in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quark_brevitas.wrappers import inner


def make_portable(module: nn.Module) -> None:
    """Let the rotations of a model compute the same in a form that can be exported, in place."""
    # Imported first of all of Brevitas, the module after it would import itself in turn.
    import brevitas.graph  # noqa: F401
    from brevitas.nn.equalized_layer import RotatedModule

    for rotated in module.modules():
        if isinstance(rotated, RotatedModule) and not rotated.expand_input:
            layer: Any = inner(rotated)
            rotated.rotation_forward = _Rotation(rotated.hidden_dim or layer.in_features)


class _Rotation:
    """A Hadamard transform of the last axis, in blocks of ``size``."""

    def __init__(self, size: int) -> None:
        from brevitas.graph.hadamard import get_hadK

        matrix, self._odd = get_hadK(size)
        self._matrix: Tensor | None = None
        if self._odd > 1:
            self._matrix = matrix.reshape(1, self._odd, self._odd)
        self._size, self._root = size, float(torch.tensor(size).sqrt())

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate ``x`` [..., inputs]."""
        parts = x.reshape(-1, self._size, 1)
        while parts.shape[1] > self._odd:
            pairs = parts.reshape(-1, parts.shape[1] // 2, 2, parts.shape[2])
            first, second = pairs[:, :, 0], pairs[:, :, 1]
            parts = torch.cat((first + second, first - second), -1)
        if self._matrix is not None:
            parts = self._matrix.to(parts) @ parts
        return parts.reshape(x.shape) / self._root
