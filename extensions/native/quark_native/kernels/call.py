"""Call: the numbers by which a kernel computes a format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quark_core.spec import Rounding

Kind = Literal["affine", "scaled", "mx", "bfp", "log", "block_log", "nvfp", "binary", "ternary"]


@dataclass(frozen=True)
class Call:
    """What a kernel needs to know of a format.

    Attributes:
        kind: The family of arithmetic. ``affine``, ``scaled``, ``log``, ``binary`` and
            ``ternary`` are given scales; the others find them in each block.
        rounding: Of the elements.
        mantissa: Stored mantissa bits of an element.
        min_exponent: Exponent of the smallest normal element.
        max_exponent: Exponent of the largest element.
        low: Smallest element.
        high: Largest element.
        bump: What is added to the bits of a block's maximum before its exponent is read, which
            is how every scale rule rounds to a power of two.
        min_scale: Smallest exponent of a block's scale.
        max_scale: Largest exponent of a block's scale.
    """

    kind: Kind
    rounding: Rounding = "nearest_even"
    mantissa: int = 0
    min_exponent: int = 0
    max_exponent: int = 0
    low: float = 0.0
    high: float = 0.0
    bump: int = 0
    min_scale: int = -127
    max_scale: int = 127

    @property
    def given(self) -> bool:
        """Whether scales are given to the kernel, not found in each block."""
        return self.kind not in ("mx", "bfp", "block_log", "nvfp")

    @property
    def fixed(self) -> bool:
        """Whether MX elements are fixed-point numbers, in two's complement."""
        return self.kind == "mx" and self.min_exponent == self.max_exponent == 0
