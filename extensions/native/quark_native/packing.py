"""Bit packing: codes of 1 to 32 bits in consecutive bytes, without gaps.

The first code takes the lowest bits of the first byte (so of two 4-bit codes in a byte the first
is the low nibble, as in torchao). Codes of more than 8 bits are stored as all their low bytes,
then the remaining bits of all of them, packed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CODES_A_STEP = 1 << 20  # eight bytes each while they are shifted together


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes take."""
    whole, rest = divmod(bits, 8)
    return count * whole + -(-count * rest // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes; of negative ones the low ``bits`` bits in two's complement.

    Args:
        codes: Integers of any shape.
        bits: Bits of a code, 1 to 32.

    Returns:
        uint8, one axis of :func:`packed_bytes` elements.
    """
    flat = codes.reshape(-1)
    planes = []
    for _ in range(bits // 8):
        planes.append((flat & 0xFF).to(torch.uint8))
        flat = flat >> 8
    if bits % 8:
        planes.append(_pack_narrow(flat, bits % 8))
    return torch.cat(planes)


def unpack(packed: Tensor, bits: int, count: int, *, signed: bool) -> Tensor:
    """Undo :func:`pack`.

    Args:
        packed: uint8, one axis.
        bits: Bits of a code.
        count: Number of codes.
        signed: Whether the top bit of a code is its sign.

    Returns:
        int32, one axis of ``count`` elements; int64 for unsigned codes of 32 bits.
    """
    whole, rest = divmod(bits, 8)
    dtype = torch.int64 if bits == 32 and not signed else torch.int32
    codes = torch.zeros(count, dtype=dtype, device=packed.device)
    for plane in range(whole):
        codes |= packed[plane * count : (plane + 1) * count].to(dtype) << (8 * plane)
    if rest:
        codes |= _unpack_narrow(packed[whole * count :], rest, count) << (8 * whole)
    unused = 32 - bits
    # An arithmetic shift to the right brings copies of the top bit in.
    return (codes << unused) >> unused if signed and unused else codes


def _pack_narrow(flat: Tensor, bits: int) -> Tensor:
    """Pack codes of fewer than 8 bits: each eight of them make ``bits`` bytes."""
    shifts = torch.arange(8, device=flat.device)
    parts = []
    for chunk in torch.split(flat, _CODES_A_STEP):
        padded = torch.zeros(-(-chunk.numel() // 8) * 8, dtype=torch.int64, device=flat.device)
        padded[: chunk.numel()] = chunk & ((1 << bits) - 1)
        words = (padded.view(-1, 8) << (bits * shifts)).sum(1, keepdim=True)
        parts.append(((words >> (8 * shifts[:bits])) & 0xFF).to(torch.uint8).flatten())
    packed = torch.cat(parts) if parts else flat.to(torch.uint8)
    return packed[: packed_bytes(flat.numel(), bits)]


def _unpack_narrow(packed: Tensor, bits: int, count: int) -> Tensor:
    shifts = torch.arange(8, device=packed.device)
    parts = []
    for chunk in torch.split(packed, _CODES_A_STEP // 8 * bits):
        padded = torch.zeros(
            -(-chunk.numel() // bits) * bits, dtype=torch.int64, device=packed.device
        )
        padded[: chunk.numel()] = chunk
        words = (padded.view(-1, bits) << (8 * shifts[:bits])).sum(1, keepdim=True)
        codes = (words >> (bits * shifts)) & ((1 << bits) - 1)
        parts.append(codes.flatten().to(torch.int32))
    return torch.cat(parts)[:count] if parts else packed.to(torch.int32)
