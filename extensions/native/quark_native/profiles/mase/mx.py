"""MASE's microscaling formats: a power-of-two scale for each block.

    mxint            e = ceil(log2 max)            q = clamp(rnd(x / 2^e 2^(w-1))),  q / 2^(w-1) 2^e
    mxfp             e = floor(log2 max) - emax    element(x / 2^e) 2^e,   emax = 2^E - 1 - bias
    mxint_hardware   e = ceil(log2 max) - 2^(E-1)  clamp(floor(x / 2^e)) 2^e

The blocks of the first two are cut from the flattened tensor after ``block_dim`` has become its
last axis: where an axis is no multiple of the block, blocks straddle rows. Source: MASE 6ff398c,
mxint/, mxfp/, mxint_hardware.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quark_native.formats.bits import MIN_NORMAL
from quark_native.profiles.mase.elements import decode, encode

SCALE_BIAS = 127
NAN_SCALE_CODE = 255
"""Code of the scale 2^128, which float32 has as infinity."""
MXFP_ELEMENTS = ((4, 3), (5, 2), (2, 3), (3, 2), (2, 1), (1, 2))
QUANTILES = (1.0, 0.995, 0.99, 0.97, 0.95, 0.93, 0.90, 0.80, 0.70, 0.60, 0.50)
"""Of a block's magnitudes: what a search tries as the block's maximum."""


def mxint(
    x: Tensor,
    *,
    block_size: int,
    element_bits: int,
    block_dim: int = -1,
    scale_bits: int = 8,
    quantile_search: bool = False,
) -> Tensor:
    """Two's complement integers with a power-of-two scale for each block.

    The Microscaling specification takes e = floor(log2 max) and 2 integer bits; here a largest
    element of exactly +2^k saturates and -2^k does not. A block with an infinity or a NaN, or
    with a maximum above 2^127, becomes NaN. With few ``scale_bits`` the element is divided by
    the true scale and multiplied by the clamped one.

    The search takes, block by block, the quantile with the least squared error; for another
    ``block_dim`` than the last it compares with the elements that lie at the same place in the
    tensor as it was, other ones than it has quantized.

    Args:
        x: float32, any shape whose number of elements is a multiple of ``block_size``.
        block_size: Elements of a block.
        element_bits: w, the sign included.
        block_dim: Axis of the blocks.
        scale_bits: Bits of the biased exponent of the scale.
        quantile_search: Whether to search for a clipping maximum.

    Raises:
        ValueError: The tensor does not fill whole blocks.
    """
    blocks = _flatten(x, block_size, block_dim)
    if not quantile_search:
        y = _mxint_blocks(blocks, _largest(blocks), element_bits, scale_bits)
        return _restore(y, x, block_dim)
    quantiles = torch.tensor(QUANTILES, device=x.device)
    # Contiguous, as MASE's are: a norm adds up in the order of memory, and near ties notice.
    largest = blocks.abs().quantile(quantiles, dim=1, keepdim=True).contiguous()
    candidates = _mxint_blocks(blocks, largest, element_bits, scale_bits)
    original = x.reshape(-1, block_size)
    best = torch.linalg.vector_norm(candidates - original, dim=-1).argmin(dim=0)
    return _restore(candidates[best, torch.arange(len(blocks), device=x.device)], x, block_dim)


def mxfp(
    x: Tensor,
    *,
    block_size: int,
    element_exp_bits: int,
    element_frac_bits: int,
    block_dim: int = -1,
    scale_exp_bits: int = 8,
    quantile_search: bool = False,
) -> Tensor:
    """Minifloats with a power-of-two scale for each block.

    Differs from the Microscaling specification in the elements, all of whose codes are finite
    (E4M3 ends at 480, E5M2 at 114688), and which lose carries and subnormals as
    :mod:`quark_native.profiles.mase.elements` says. A block with an infinity or a NaN becomes
    infinities and NaNs.

    The search weighs integers that are not the candidates: the codes, times a power of two in 8
    bits, which is 0 unless the scale is 1 to 128. So it changes nothing in blocks of ordinary
    size.

    Args:
        x: float32, any shape whose number of elements is a multiple of ``block_size``;
            subnormals count as zero.
        block_size: Elements of a block.
        element_exp_bits: E.
        element_frac_bits: M; (E, M) is one of ``MXFP_ELEMENTS``.
        block_dim: Axis of the blocks.
        scale_exp_bits: 8.
        quantile_search: Whether to run the search.

    Raises:
        ValueError: The tensor does not fill whole blocks, or MASE has no such format.
    """
    element = (element_exp_bits, element_frac_bits)
    if element not in MXFP_ELEMENTS or scale_exp_bits != 8:
        raise ValueError(f"MASE has no MXFP of elements {element} and {scale_exp_bits}-bit scales")
    blocks = _flatten(x, block_size, block_dim)
    blocks = torch.where(blocks.abs() < MIN_NORMAL, 0.0, blocks)
    scales, codes = _mxfp_codes(blocks, _largest(blocks), element)
    if quantile_search:
        scales, codes = _mxfp_search(x.reshape(-1, block_size), blocks, element)
    y = decode(codes, *element) * torch.exp2(scales - SCALE_BIAS)
    return _restore(y, x, block_dim)


def mxint_hardware(
    x: Tensor, *, parallelism: Sequence[int], width: int = 12, exponent_width: int = 6
) -> Tensor:
    """Integers rounded down, with an exponent for each tile of the last two axes.

    The exponent's bias takes the place of the integer's width in the scale, so the result is
    right only where 2^(exponent_width - 1) is about width - 1.

    Args:
        x: float32, any shape; one axis counts as one row.
        parallelism: Rows and columns of a tile, or columns alone.
        width: Bits of the integer, the sign included.
        exponent_width: E, bits of the exponent.

    Raises:
        ValueError: The last two axes are no multiples of the tile.
    """
    rows, columns = (1, *parallelism) if len(parallelism) == 1 else parallelism
    matrix = x.reshape(1, -1) if x.ndim == 1 else x
    height, length = matrix.shape[-2:]
    if height % rows or length % columns:
        raise ValueError(f"tiles of {rows} x {columns} do not fill a tensor of {list(x.shape)}")
    tiles = matrix.reshape(-1, height // rows, rows, length // columns, columns)
    bias = 2 ** (exponent_width - 1)
    exponent = torch.ceil(torch.log2(tiles.abs().amax(dim=(2, 4), keepdim=True))) - bias
    power = torch.exp2(exponent.clamp(-bias, 2**exponent_width - 1 - bias))
    top = 2 ** (width - 1)
    y: Tensor = power * torch.floor(tiles / power).clamp(-top, top - 1)
    return y.reshape(x.shape)


def _mxint_blocks(blocks: Tensor, largest: Tensor, bits: int, scale_bits: int) -> Tensor:
    """The blocks on the grid that ``largest`` sets; [.., blocks, 1] against [blocks, size]."""
    scale = torch.ceil(torch.log2(largest.clamp(min=MIN_NORMAL)))
    top = 2 ** (bits - 1)
    q = torch.round(blocks / torch.exp2(scale) * top).clamp(-top, top - 1)
    bias = 2 ** (scale_bits - 1) - 1
    stored = (scale + bias).clamp(0, 2**scale_bits - 1)
    y: Tensor = q / top * torch.exp2(stored - bias)
    return y


def _mxfp_codes(blocks: Tensor, largest: Tensor, element: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Biased scales [blocks, 1] and element codes [blocks, size], both int32."""
    top_exponent = 2 ** (element[0] - 1)  # field 2^E - 1 less the bias 2^(E-1) - 1
    exponent = torch.floor(torch.log2(largest)) - top_exponent
    # The integer conversion of an infinity or a NaN wraps around to the largest exponent.
    exponent = torch.where(exponent.isfinite(), exponent, NAN_SCALE_CODE - SCALE_BIAS)
    exponent = exponent.clamp(-SCALE_BIAS, NAN_SCALE_CODE - SCALE_BIAS).to(torch.int32)
    codes = encode(torch.where(blocks == 0, 0.0, blocks / torch.exp2(exponent)), *element)
    empty = (blocks == 0).all(dim=1, keepdim=True)
    return torch.where(empty, 0, exponent + SCALE_BIAS), codes


def _mxfp_search(
    original: Tensor, blocks: Tensor, element: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The scales and codes of the quantile whose misread candidate is nearest to the original."""
    best_scales, best_codes = _mxfp_codes(blocks, _largest(blocks), element)
    least = torch.full((len(blocks), 1), torch.inf, device=blocks.device)
    for quantile in QUANTILES:
        largest = blocks.abs().quantile(quantile, dim=1, keepdim=True)
        scales, codes = _mxfp_codes(blocks, largest, element)
        shift = (scales - SCALE_BIAS) % 256
        weight = torch.where(shift < 8, torch.exp2(shift), 0.0)
        misread = codes / 2 ** (element[1] - 1) * weight
        error = (misread - original).square().sum(dim=1, keepdim=True)
        best_scales = torch.where(error < least, scales, best_scales)
        best_codes = torch.where(error < least, codes, best_codes)
        least = torch.where(error < least, error, least)
    return best_scales, best_codes


def _largest(blocks: Tensor) -> Tensor:
    """The quantile 1 of each row's magnitudes, [blocks, 1].

    torch.quantile interpolates, inf + 0 * (inf - inf), so an infinity counts as NaN.
    """
    largest = blocks.abs().amax(dim=1, keepdim=True)
    return torch.where(largest.isinf(), torch.nan, largest)


def _flatten(x: Tensor, block_size: int, block_dim: int) -> Tensor:
    if x.numel() % block_size:
        raise ValueError(f"blocks of {block_size} do not fill a tensor of shape {list(x.shape)}")
    return x.movedim(block_dim, -1).reshape(-1, block_size).contiguous()


def _restore(blocks: Tensor, x: Tensor, block_dim: int) -> Tensor:
    return blocks.reshape(x.movedim(block_dim, -1).shape).movedim(-1, block_dim)
