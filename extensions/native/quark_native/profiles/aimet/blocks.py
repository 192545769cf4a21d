"""Which elements share a scale in AIMET: broadcasting, or blocks of a tensor's last axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def split(x: Tensor, shape: Sequence[int], block_size: Sequence[int] | None) -> Tensor:
    """View x as [rest, n0, b0, n1, b1, ...] for scales of ``shape`` [n0, n1, ...].

    Without blocks, x as it is.

    Raises:
        ValueError: The blocks do not cover the tensor.
    """
    if block_size is None:
        return x
    axes = x.shape[max(0, x.ndim - len(shape)) :]
    blocks: list[int] = []
    if len(axes) == len(shape) == len(block_size):
        blocks = [
            length // count if size == -1 else size
            for length, count, size in zip(axes, shape, block_size, strict=True)
        ]
    if [count * size for count, size in zip(shape, blocks, strict=False)] != list(axes):
        raise ValueError(
            f"scales of shape {list(shape)} and blocks of {list(block_size)} "
            f"do not cover a tensor of shape {list(x.shape)}"
        )
    pairs = zip(shape, blocks, strict=True)
    return x.reshape(-1, *(length for pair in pairs for length in pair))


def spread(scale: Tensor, block_size: Sequence[int] | None) -> Tensor:
    """View a scale so that it broadcasts against what :func:`split` returns."""
    if block_size is None:
        return scale
    return scale.reshape([length for count in scale.shape for length in (count, 1)])


def reduce(
    x: Tensor,
    operation: Callable[..., Tensor],
    shape: Sequence[int],
    block_size: Sequence[int] | None,
) -> Tensor:
    """Reduce x to ``shape`` by an operation such as torch.amax.

    Raises:
        ValueError: x cannot be reduced to that shape.
    """
    parts = split(x, shape, block_size)
    if block_size is None:
        kept = [1] * (parts.ndim - len(shape)) + list(shape)
        fits = len(kept) == parts.ndim and all(
            count in (1, length) for count, length in zip(kept, parts.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"a tensor of shape {list(x.shape)} has no scales of {list(shape)}")
        axes = [axis for axis, count in enumerate(kept) if count == 1]
    else:
        axes = list(range(0, parts.ndim, 2))
    return operation(parts, dim=axes, keepdim=True).reshape(list(shape)) if axes else parts
