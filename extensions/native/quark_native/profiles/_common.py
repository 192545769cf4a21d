"""Pieces that several profiles share: element formats, blocks along an axis, exact rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quark_native.formats.bits import MIN_SUBNORMAL_EXPONENT, exponent_of, power_of_two

MIN_E8M0_EXPONENT = -127
MAX_E8M0_EXPONENT = 127
MAX_E8M0 = 255
"""The code of an E8M0 scale that is no number."""


class Element(NamedTuple):
    """An element format: sign, exponent field, mantissa field."""

    exponent_bits: int
    """0 for the integers, whose values are fixed point with one bit before the point."""
    mantissa_bits: int
    """Stored bits; of an integer, those after the point."""
    emax: int
    """Exponent of the largest element."""
    max: float

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal element; its quantum is the subnormals' as well."""
        return 2 - 2 ** (self.exponent_bits - 1) if self.exponent_bits else 0

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits + (self.exponent_bits == 0)


ELEMENTS = {
    "fp8_e4m3": Element(4, 3, 8, 448.0),
    "fp8_e5m2": Element(5, 2, 15, 57344.0),
    "fp6_e3m2": Element(3, 2, 4, 28.0),
    "fp6_e2m3": Element(2, 3, 2, 7.5),
    "fp4_e2m1": Element(2, 1, 2, 6.0),
    "int8": Element(0, 6, 0, 127 / 64),
    "int4": Element(0, 2, 0, 7 / 4),
    "int2": Element(0, 0, 0, 1.0),
}


def element_of(name: str, *, without: tuple[str, ...] = ()) -> Element:
    """The element format of a name.

    Raises:
        ValueError: the name is unknown, or one that the library lacks.
    """
    known = [each for each in ELEMENTS if each not in without]
    if name not in known:
        raise ValueError(f"element {name!r} is none of {', '.join(known)}")
    return ELEMENTS[name]


def blockwise(
    function: Callable[[Tensor], Tensor], x: Tensor, *, block: int, axis: int = -1
) -> Tensor:
    """Applies a function to blocks along one axis; a short last block is filled with zeros.

    Args:
        function: takes [..., blocks, block] and returns the same shape.
        x: any shape with at least one dimension.
        block: elements a block; 0 for the whole axis. An axis that is shorter is one block.
        axis: the axis that the blocks lie along.

    Returns:
        The shape of x, contiguous.
    """
    moved = x.movedim(axis, -1)
    length = moved.shape[-1]
    size = min(block, length) if block else length
    filled = torch.nn.functional.pad(moved, (0, -length % size))
    out = function(filled.reshape(*filled.shape[:-1], -1, size)).flatten(-2)
    return out[..., :length].movedim(-1, axis).contiguous()


def block_max(x: Tensor) -> Tensor:
    """The largest magnitude of each block, NaN where a block holds one.

    Args:
        x: [..., block].

    Returns:
        [..., 1].
    """
    return x.abs().amax(-1, keepdim=True)


def round_to_grid(x: Tensor, element: Element, rounding: str = "even") -> Tensor:
    """The element nearest to each value; what is too large becomes the largest element.

    Exact: the quantum is a power of two not below 2 ** -17, so value / quantum is exact unless it
    is far below one half.

    Args:
        x: float32, any shape.
        element: the grid.
        rounding: "even" and "nearest" differ in ties (to even, away from zero), "floor" cuts
            magnitudes off.

    Returns:
        float32, the sign kept for zero, NaN kept, infinities as the largest element.
    """
    exponent = exponent_of(x).clamp(element.emin, element.emax)
    quantum = power_of_two(exponent - element.mantissa_bits)
    magnitude = round_magnitude(x.abs() / quantum, rounding)
    return (magnitude * quantum).clamp(max=element.max).copysign(x)


def round_magnitude(x: Tensor, rounding: str) -> Tensor:
    """Rounds values that are not negative to integers, exactly.

    Args:
        x: float32, any shape.
        rounding: "even", "nearest" (ties away from zero) or "floor".

    Raises:
        ValueError: the rounding is unknown.
    """
    if rounding == "even":
        return x.round()
    whole = x.floor()
    if rounding == "floor":
        return whole
    if rounding == "nearest":
        return whole + (x - whole >= 0.5)
    raise ValueError(f"rounding {rounding!r} is none of even, nearest, floor")


def encode_grid(values: Tensor, element: Element) -> Tensor:
    """The codes (sign, exponent, mantissa) of values that are elements.

    Args:
        values: float32 elements, any shape, no NaN.
        element: their format.

    Returns:
        uint8.
    """
    exponent = exponent_of(values).clamp(min=element.emin)
    units = values.abs() / power_of_two(exponent - element.mantissa_bits)
    # A normal element has units >= 2**m: its leading one raises the exponent field by one.
    field = (exponent - element.emin) << element.mantissa_bits
    sign = values.signbit().to(torch.int32) << (element.bits - 1)
    return (sign + field + units.to(torch.int32)).to(torch.uint8)


def exact_exponent(x: Tensor) -> Tensor:
    """floor(log2 |x|), subnormals included.

    Args:
        x: float32, any shape.

    Returns:
        int32; -150 for zero, 128 for infinities and NaN.
    """
    found = (torch.frexp(x).exponent - 1).to(torch.int32)
    found = torch.where(x == 0, MIN_SUBNORMAL_EXPONENT - 1, found)
    return torch.where(x.isfinite(), found, 128)
