"""MASE's one- and two-bit quantizers.

    binary, bipolar       +1 where x >= 0, else -1
    binary, not bipolar   mean |x| where x > 0, else 0; the mean over all axes but the first
    ternary               sign(x) where |x| > d, else 0,   d = 0.75 mean |x| of each first index
    residual_sign         sign(r_l) |mean_l|,   r_0 = x,   r_(l+1) = r_l - sign(r_l) |mean_l|

Source: MASE 6ff398c, binary.py, ternary.py, utils.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_OTHERS = (1, 2, 3)


def binary(x: Tensor, *, stochastic: bool = False, bipolar: bool = False) -> Tensor:
    """One bit an element.

    Zero counts as positive when bipolar and as negative when not. A stochastic threshold is a
    uniform draw from torch's global generator, compared with clamp((x + 1) / 2, 0, 1); when not
    bipolar it is drawn and then ignored: the clamped value's own mean over the positive ones is
    what comes back.

    Args:
        x: float32, any shape when bipolar, else of 4 axes.
        stochastic: Whether to draw thresholds.
        bipolar: Whether the values are -1 and +1, without a scale.

    Raises:
        ValueError: Not bipolar, and not of 4 axes.
    """
    threshold = torch.zeros_like(x)
    if stochastic:
        x, threshold = ((x + 1) / 2).clamp(0, 1), torch.rand_like(x)
    if bipolar:
        return torch.where(x >= threshold, 1.0, -1.0)
    _check_axes(x)
    return torch.where(x > 0, 1.0, 0.0) * x.abs().mean(dim=_OTHERS, keepdim=True)


def ternary(
    x: Tensor,
    *,
    threshold: float | None = None,
    maximum: float | None = None,
    median: float | None = None,
    mean: float | None = None,
    scaling_factor: bool = False,
) -> Tensor:
    """-1, 0 and +1, with a scale for each first index if asked for.

    The scale is the mean of the magnitudes above the threshold, 0 / 0 = NaN where there are
    none.

    Args:
        x: float32 of 4 axes.
        threshold: Ignored, as MASE ignores it.
        maximum: Ignored.
        median: Ignored.
        mean: Ignored.
        scaling_factor: Whether to scale.

    Raises:
        ValueError: Not of 4 axes.
    """
    del threshold, maximum, median, mean
    _check_axes(x)
    value = x.abs()
    limit = 0.75 * value.flatten(1).sum(dim=1) / x[0].numel()
    limit = limit.view(-1, 1, 1, 1)
    signs = torch.where(x > limit, 1.0, 0.0) - torch.where(x < -limit, 1.0, 0.0)
    if not scaling_factor:
        return signs
    above = (value > limit).to(torch.float32)
    scale = (above * value).sum(dim=_OTHERS, keepdim=True) / above.sum(dim=_OTHERS, keepdim=True)
    return signs * scale


def residual_sign(x: Tensor, *, levels: int, means: Sequence[float] | Tensor) -> Tensor:
    """Signs, then the signs of what they leave, for one to three levels.

    Each sign is c + (sign(c) - c) with c = clamp(x, -1, 1), whose roundings can leave it a
    float32 step away from -1 or +1. The sign of 0 is 0.

    Args:
        x: float32, any shape.
        levels: 1, 2 or 3.
        means: A magnitude for each level; signs are dropped. MASE starts training at
            levels, .., 1, divided by their sum.

    Returns:
        The shape of x for one level, else the levels stacked in front of it, not added up.

    Raises:
        ValueError: Another number of levels, or fewer means.
    """
    if levels not in (1, 2, 3):
        raise ValueError(f"MASE has 1, 2 or 3 levels, not {levels}")
    sizes = torch.as_tensor(means, dtype=torch.float32, device=x.device).abs()
    if len(sizes) < levels:
        raise ValueError(f"{levels} levels need as many means, not {len(sizes)}")
    found = []
    rest = x
    for size in sizes[:levels]:
        clipped = rest.clamp(-1, 1)
        found.append((clipped + (clipped.sign() - clipped)) * size)
        rest = rest - found[-1]
    return found[0] if levels == 1 else torch.stack(found)


def _check_axes(x: Tensor) -> None:
    if x.ndim != len(_OTHERS) + 1:
        raise ValueError(f"MASE's means need a tensor of 4 axes, not of shape {list(x.shape)}")
