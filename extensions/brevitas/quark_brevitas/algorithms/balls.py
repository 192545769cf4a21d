"""Cutting magnitudes so that their sum does not exceed a bound."""

from __future__ import annotations

import torch
from torch import Tensor

_NEWTON = 30


def l1_cut(sizes: Tensor, radius: float | Tensor) -> Tensor:
    """What to take off the magnitudes of each row for them to sum up to at most ``radius``.

    That is the t at which f(t) = sum max(|x| - t, 0) is ``radius``, or 0. f is convex, so Newton's
    steps from the left of t never pass it, and end exactly after as many as f has kinks in
    between, which are few; sorting every row takes several times longer.

    Args:
        sizes: Magnitudes, [rows, columns].
        radius: The bound.

    Returns:
        [rows, 1].
    """
    largest = sizes.amax(1, keepdim=True)
    cut = (sizes.sum(1, keepdim=True) - radius) / sizes.shape[1]
    cut = torch.maximum(largest - radius, cut).clamp_(min=0)
    for _ in range(_NEWTON):
        over = (sizes - cut).clamp_(min=0)
        step = (over.sum(1, keepdim=True) - radius) / over.count_nonzero(1).clamp_(min=1)[:, None]
        cut = cut + step.clamp_(min=0)
        if bool((step <= 1e-6 * (1 + cut)).all()):
            break
    return cut
