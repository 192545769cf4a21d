"""AIMET's low-power blockwise quantization: block scales that are multiples of a group's.

    P       = 2^(decompressed_bw - bitwidth)
    s_group = max of the group's block scales / P
    k       = clamp(rnd(s_block / s_group), 1, P)
    scale   = k s_group

Source: aimet-torch 2.42.0, GroupedBlockQuantizeDequantize in quantization/affine/quantizer.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quark_native.profiles.aimet.affine import dequantize, grid, quantize, quantize_dequantize
from quark_native.profiles.aimet.blocks import reduce
from quark_native.profiles.aimet.calibration import min_max, scale_offset


def lpbq(
    x: Tensor,
    *,
    shape: Sequence[int],
    bitwidth: int,
    decompressed_bw: int,
    block_size: Sequence[int],
    block_grouping: Sequence[int] | None = None,
) -> Tensor:
    """Calibrate on x by min-max, then quantize and dequantize it.

    Args:
        x: float32.
        shape: Of the block scales.
        bitwidth: Of the signed, symmetric integers.
        decompressed_bw: Bits that hold k times such an integer.
        block_size: Elements of a block on each axis; -1 is all that the shape leaves.
        block_grouping: Blocks of a group on each axis; -1 is all, None a group for each block.

    Returns:
        The shape of x.

    Raises:
        ValueError: Blocks or groups do not cover the tensor, or ``decompressed_bw`` is below
            ``bitwidth``.
    """
    qmin, qmax = grid(bitwidth, symmetric=True)
    low, high = min_max(x, steps=qmax - qmin, symmetric=True, shape=shape, block_size=block_size)
    raw, offset = scale_offset(low, high, qmin=qmin, qmax=qmax, symmetric=True)
    scale, _, _ = lpbq_scales(
        raw, bitwidth=bitwidth, decompressed_bw=decompressed_bw, block_grouping=block_grouping
    )
    return quantize_dequantize(
        x, scale=scale, offset=offset, qmin=qmin, qmax=qmax, block_size=block_size
    )


def lpbq_scales(
    scale: Tensor,
    *,
    bitwidth: int,
    decompressed_bw: int,
    block_grouping: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What becomes of the scales of blocks.

    Args:
        scale: float32, one for each block.
        bitwidth: Of the integers.
        decompressed_bw: Bits that hold k times such an integer.
        block_grouping: As in :func:`lpbq`.

    Returns:
        The scales in use, of the same shape; those of the groups; and k, of the same shape as
        the first. All float32.

    Raises:
        ValueError: As in :func:`lpbq`.
    """
    if decompressed_bw < bitwidth:
        raise ValueError(
            f"decompressed_bw {decompressed_bw} is below bitwidth {bitwidth}: raise it"
        )
    grouping = (1,) * scale.ndim if block_grouping is None else tuple(block_grouping)
    groups = [
        1 if size == -1 else length // size
        for length, size in zip(scale.shape, grouping, strict=True)
    ]
    parts = 2 ** (decompressed_bw - bitwidth)
    shared = reduce(scale, torch.amax, groups, grouping) / parts
    none = torch.zeros_like(shared)
    multiples = quantize(scale, scale=shared, offset=none, qmin=1, qmax=parts, block_size=grouping)
    return (
        dequantize(multiples, scale=shared, offset=none, block_size=grouping),
        shared,
        multiples,
    )
