"""MASE's block formats: an exponent or an exponent bias that a block of elements shares.

    block_fp          e = ceil(log2 max)     sign 2^e clamp(rnd((|x| + 1e-9) / 2^e 2^m)) / 2^m
    block_minifloat   bias = clamp(floor(log2 max), 0, 2^B - 1)             then minifloat_ieee
    block_log         bias = clamp(2^(w-1) - 1 - ceil(log2 max), 0, 2^B - 1)          then log

max is the block's largest magnitude; a block of zeros takes the smallest one above zero that
another block has, or 1. Source: MASE 6ff398c, block_fp.py, block_minifloat.py, block_log.py and
``block`` in utils.py.

A block's shape is aligned with the tensor's from the right. Axes it does not mention, the size -1
and sizes above the axis stand for the whole axis: [16] on a matrix is all rows by 16 columns.
Short blocks at the end are filled with zeros. ``skip_first_dim`` makes the first axis a batch
that blocks never span.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from quark_native.profiles.mase.elementwise import (
    OFFSET,
    default_bias,
    ieee_with_bias,
    log_with_bias,
    unless_nearly_zero,
)


def block_fp(
    x: Tensor,
    *,
    width: int = 12,
    exponent_width: int = 8,
    exponent_bias: int | None = None,
    block_size: Sequence[int] | int = (16,),
    skip_first_dim: bool = True,
) -> Tensor:
    """Sign and magnitude with an exponent for each block.

    A largest magnitude of exactly 2^k saturates at (1 - 2^-m) 2^k, because its exponent is k and
    not k + 1. Magnitudes up to 1e-8 come back as they are; infinities, and blocks whose scale
    overflows, become NaN.

    Args:
        x: float32 of 1 or 2 axes, or of 2 or 3 with ``skip_first_dim``.
        width: Sign and m = width - 1 bits of magnitude.
        exponent_width: E, bits of the exponent.
        exponent_bias: None is 2^(E-1) - 1.
        block_size: Shape of a block.
        skip_first_dim: Whether the first axis is a batch.

    Raises:
        ValueError: The tensor has another number of axes.
    """
    blocks, largest = _split(x, block_size, skip_first_dim)
    bias = default_bias(exponent_width, exponent_bias)
    exponent = torch.ceil(torch.log2(largest))
    power = torch.exp2(exponent.clamp(-bias, 2**exponent_width - 1 - bias))
    steps = 2 ** (width - 1)
    magnitude = (blocks.abs() + OFFSET) / power
    magnitude = torch.round(magnitude * steps).clamp(0, steps - 1) / steps
    y = torch.sign(blocks + OFFSET) * power * magnitude
    return unless_nearly_zero(x, _join(y, x))


def block_minifloat(
    x: Tensor,
    *,
    width: int,
    exponent_width: int,
    exponent_bias_width: int,
    block_size: Sequence[int] | int = (16,),
    skip_first_dim: bool = False,
) -> Tensor:
    """Minifloats with an exponent bias for each block.

    The bias has the wrong sign: it grows with the block's magnitude, where it should fall, and
    is 0 for every block below 2. So blocks far below 1 become zero and blocks far above it
    saturate; near 2^(2^(E-1)) the format works. Elements otherwise as in
    :func:`~quark_native.profiles.mase.minifloat_ieee`.

    Args:
        x: float32 of 1 or 2 axes, or of 2 or 3 with ``skip_first_dim``.
        width: Bits of an element.
        exponent_width: E, exponent bits of an element.
        exponent_bias_width: B, bits of the bias.
        block_size: Shape of a block.
        skip_first_dim: Whether the first axis is a batch.

    Raises:
        ValueError: The tensor has another number of axes.
    """
    blocks, largest = _split(x, block_size, skip_first_dim)
    bias = torch.floor(torch.log2(largest)).clamp(0, 2**exponent_bias_width - 1)
    return _join(ieee_with_bias(blocks, width, exponent_width, bias), x)


def block_log(
    x: Tensor,
    *,
    width: int,
    exponent_bias_width: int,
    block_size: Sequence[int] | int = (16,),
    skip_first_dim: bool = False,
) -> Tensor:
    """Powers of two with an exponent bias for each block; there is no zero.

    Elements as in :func:`~quark_native.profiles.mase.log`: a zero becomes 2^-bias of its block.

    Args:
        x: float32 of 1 or 2 axes, or of 2 or 3 with ``skip_first_dim``.
        width: One sign bit and width - 1 exponent bits.
        exponent_bias_width: B, bits of the bias.
        block_size: Shape of a block.
        skip_first_dim: Whether the first axis is a batch.

    Raises:
        ValueError: The tensor has another number of axes.
    """
    blocks, largest = _split(x, block_size, skip_first_dim)
    bias = 2 ** (width - 1) - 1 - torch.ceil(torch.log2(largest))
    return _join(log_with_bias(blocks, width, bias.clamp(0, 2**exponent_bias_width - 1)), x)


def _split(
    x: Tensor, block_size: Sequence[int] | int, skip_first_dim: bool
) -> tuple[Tensor, Tensor]:
    """Blocks [n0, b0, n1, b1, ...] and their largest magnitudes, with 1 for each b."""
    ranks = (2, 3) if skip_first_dim else (1, 2)
    if x.ndim not in ranks:
        raise ValueError(
            f"MASE blocks tensors of {ranks[0]} or {ranks[1]} axes with "
            f"skip_first_dim={skip_first_dim}, not of shape {list(x.shape)}"
        )
    block = _block_shape(tuple(x.shape), block_size, skip_first_dim)
    missing = [-size % part for size, part in zip(x.shape, block, strict=True)]
    padded = pad(x, [amount for short in reversed(missing) for amount in (0, short)])
    shape = [
        count
        for size, part in zip(padded.shape, block, strict=True)
        for count in (size // part, part)
    ]
    blocks = padded.reshape(shape)
    largest = blocks.abs().amax(dim=tuple(range(1, blocks.ndim, 2)), keepdim=True)
    return blocks, _without_zeros(largest)


def _join(blocks: Tensor, x: Tensor) -> Tensor:
    """The blocks as one tensor, cut to the shape of x."""
    counts, parts = blocks.shape[::2], blocks.shape[1::2]
    whole = blocks.reshape([count * part for count, part in zip(counts, parts, strict=True)])
    return whole[tuple(slice(size) for size in x.shape)]


def _block_shape(
    shape: tuple[int, ...], block_size: Sequence[int] | int, skip_first_dim: bool
) -> list[int]:
    wanted = [block_size] if isinstance(block_size, int) else list(block_size)
    wanted = [-1] * (len(shape) - len(wanted)) + wanted[-len(shape) :]
    whole = (1, *shape[1:]) if skip_first_dim else shape
    return [
        size if part == -1 else min(part, size) for part, size in zip(wanted, whole, strict=True)
    ]


def _without_zeros(largest: Tensor) -> Tensor:
    empty = largest == 0
    if empty.all():
        return torch.ones_like(largest)
    # A NaN among the others is their minimum, and so reaches the blocks of zeros, as in MASE.
    return torch.where(empty, largest[~empty].min(), largest)
