"""Rounding to integers in six modes, and the random bits of stochastic rounding.

With n = floor(|x|) and f = |x| - n, which are exact:

    nearest_even   IEEE 754 roundTiesToEven
    nearest_away   n + 1 if f >= 1/2, else n; the sign of x
    toward_zero    n with the sign of x
    floor, ceil    toward minus and plus infinity
    stochastic     n + 1 if u < f, else n, with u uniform in [0, 1); the sign of x

The random numbers are counter-based: u of element i (its place in the contiguous tensor) is a
function of the seed and i alone, so every device, thread count and memory layout draws the same.
They are Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with
the counter i // 4 and the seed as key; of its four words element i takes word i mod 4, and of
that the upper 24 bits, since a float32 holds no more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quark_core.spec import Rounding

NOISE_BITS = 24
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


@dataclass(frozen=True)
class Rounder:
    """One mode of rounding, with the random numbers it needs.

    Attributes:
        mode: As the module's table names it.
        noise: For ``stochastic``: integers in [0, 2^24), float32, broadcasting against what is
            rounded.
    """

    mode: Rounding = "nearest_even"
    noise: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Round each value to an integer; NaN stays NaN. May change x.

        Args:
            x: float32 or float64; beyond 2^24 every float32 is an integer already.
        """
        if self.mode == "nearest_even":
            return x.round_()
        if self.mode == "floor":
            return x.floor_()
        if self.mode == "ceil":
            return x.ceil_()
        whole = x.trunc()
        if self.mode == "toward_zero":
            return whole
        rest = (x - whole).abs_()
        if self.mode == "nearest_away":
            up = rest >= 0.5
        else:
            assert self.noise is not None
            up = rest * 2.0**NOISE_BITS > self.noise
        # The sign of x itself: what rounds to zero keeps it.
        return whole.abs_().add_(up).copysign_(x)

    def divide(self, x: Tensor, scale: Tensor) -> Tensor:
        """X / scale, for rounding.

        A quotient too small for its dtype becomes the smallest number with its sign, where that
        is still rounded away from zero.
        """
        quotient = x / scale
        if self.mode in ("floor", "ceil", "stochastic"):
            lost = (quotient == 0) & (x != 0)
            tiny = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
            quotient = torch.where(lost, torch.copysign(torch.full_like(x, tiny), x), quotient)
        return quotient


def noise(shape: tuple[int, ...], seed: int, device: torch.device | None = None) -> Tensor:
    """The random integers in [0, 2^24) of a tensor's elements, as float32.

    Args:
        shape: The tensor's shape.
        seed: 0 to 2^64 - 1.
        device: Where to make them.
    """
    count = torch.Size(shape).numel()
    counters = torch.arange(-(-count // 4), dtype=torch.int64, device=device)
    words = torch.stack(philox(counters, seed), -1).flatten()[:count]
    return (words >> (32 - NOISE_BITS)).to(torch.float32).reshape(shape)


def philox(counter: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of 64-bit counters.

    Args:
        counter: int64, not negative.
        seed: The 64-bit key.

    Returns:
        The four 32-bit words, each int64 in the counter's shape.
    """
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    word0, word1 = counter & _WORD, (counter >> 32) & _WORD
    word2, word3 = torch.zeros_like(counter), torch.zeros_like(counter)
    for _ in range(_ROUNDS):
        # A product's 64 bits are right even where int64 takes the top one for a sign.
        first, second = word0 * _MULTIPLIERS[0], word2 * _MULTIPLIERS[1]
        word0, word1 = ((second >> 32) & _WORD) ^ word1 ^ key0, second & _WORD
        word2, word3 = ((first >> 32) & _WORD) ^ word3 ^ key1, first & _WORD
        key0, key1 = (key0 + _KEY_STEPS[0]) & _WORD, (key1 + _KEY_STEPS[1]) & _WORD
    return word0, word1, word2, word3
