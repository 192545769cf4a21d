"""Rounding the rows of a weight column by column so that outputs change little.

With H the second moments of the inputs, all three minimize the change of outputs greedily:

GPTQ (Frantar et al. 2022, arXiv 2210.17323): round column t, then move the columns after it by
    -error_t * U[t, t:] / U[t, t],  U the upper Cholesky factor of the inverse of H.
GPFQ (Lybrand and Saab 2021; Zhang, Zhou and Saab 2023): round
    (w_t G[t, t] + sum over s < t of (w_s G[t, s] - q_s H[t, s])) / H[t, t],
    with H of the quantized inputs, and G their product with the float ones.
Qronos (Zhang et al. 2025, arXiv 2505.11695): round the first column to make up for all that
    quantized inputs change, set the others to what then fits best, and go on as GPTQ does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quark_brevitas.algorithms.accumulate import Limit
from quark_brevitas.algorithms.columns import largest_eigenvalue
from quark_brevitas.algorithms.grid import Grid, Rounder

_TINY = 1e-30
_BLOCK = 128
"""Columns after which the rest of the weight is brought up to date in one product."""


def in_order(moments: Tensor, by_size: bool) -> Tensor:
    """The order of columns: as they stand, or those with the largest inputs first."""
    if by_size:
        return torch.argsort(moments.diagonal(), descending=True)
    return torch.arange(moments.shape[0], device=moments.device)


def gptq(
    weight: Tensor,
    moments: Tensor,
    grid: Grid,
    rows: slice,
    *,
    act_order: bool,
    damping: float,
    limit: Limit | None = None,
) -> Tensor:
    """The rounded weight [rows, columns].

    Args:
        weight: The float weight.
        moments: Second moments of its inputs, [columns, columns].
        grid: What the weight can be.
        rows: Which rows of the grid these are.
        act_order: Columns with the largest inputs first.
        damping: Added to the diagonal, as a share of its mean.
        limit: Keeps codes to a register.
    """
    moments = moments / _unit(moments)
    dead = moments.diagonal() == 0
    moments = moments + torch.diag(dead.to(moments.dtype))
    weight = weight.masked_fill(dead, 0.0)
    order = in_order(moments, act_order)
    ordered = moments[order][:, order]
    ordered = ordered + damping * ordered.diagonal().mean() * _ones(ordered)
    rounder = grid.rounder(rows, order)
    rounder = limit(rounder, order) if limit is not None else rounder
    rounded = _diffuse(weight[:, order], _factor(ordered), rounder, 0)
    return _restore(rounded, order)


def gpfq(
    weight: Tensor,
    moments: Tensor,
    mixed: Tensor,
    grid: Grid,
    rows: slice,
    *,
    act_order: bool,
    limit: Limit | None = None,
) -> Tensor:
    """The rounded weight [rows, columns].

    Args:
        weight: The float weight.
        moments: Second moments of the quantized inputs, [columns, columns].
        mixed: Sum of quantized times float inputs, [quantized column, float column].
        grid: What the weight can be.
        rows: Which rows of the grid these are.
        act_order: Columns with the largest inputs first.
        limit: Keeps codes to a register.
    """
    order = in_order(moments, act_order)
    moments, mixed, weight = moments[order][:, order], mixed[order][:, order], weight[:, order]
    diagonal = moments.diagonal()
    inverse = torch.where(diagonal != 0, 1 / diagonal, torch.zeros_like(diagonal))[:, None]
    wanted = weight @ (mixed.tril() * inverse).t()
    past = (moments.tril(-1) * inverse).t().contiguous()
    rounder = grid.rounder(rows, order)
    rounder = limit(rounder, order) if limit is not None else rounder
    left = wanted.t().contiguous()
    rounded = torch.empty_like(left)
    columns = len(order)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        for at in range(start, end):
            rounded[at] = rounder(left[at], at)
            left[at + 1 : end].addr_(past[at, at + 1 : end], rounded[at], alpha=-1)
        left[end:].addmm_(past[start:end, end:].t(), rounded[start:end], alpha=-1)
    return _restore(rounded.t(), order)


def qronos(
    weight: Tensor,
    moments: Tensor,
    mixed: Tensor,
    grid: Grid,
    rows: slice,
    *,
    act_order: bool,
    alpha: float,
) -> Tensor:
    """The rounded weight [rows, columns].

    Args:
        weight: The float weight.
        moments: Second moments of the quantized inputs, [columns, columns].
        mixed: Sum of quantized times float inputs, [quantized column, float column].
        grid: What the weight can be.
        rows: Which rows of the grid these are.
        act_order: Columns with the largest inputs first.
        alpha: Damping, as a share of the largest eigenvalue.
    """
    unit = _unit(moments)
    moments, mixed = moments / unit, mixed / unit
    dead = moments.diagonal() == 0
    moments = moments + torch.diag(dead.to(moments.dtype))
    weight = weight.masked_fill(dead, 0.0)
    order = in_order(moments, act_order)
    moments, mixed, weight = moments[order][:, order], mixed[order][:, order], weight[:, order]
    rounder = grid.rounder(rows, order)
    damping = alpha * largest_eigenvalue(moments)
    first = (weight @ mixed[0] - weight[:, 1:] @ moments[0, 1:]) / moments[0, 0]
    rounded = rounder(first, 0)[:, None].to(weight.dtype)
    if len(order) == 1:
        return rounded
    rest = moments[1:, 1:] + damping * _ones(moments[1:, 1:])
    wanted = weight @ mixed[1:].t() + damping * weight[:, 1:] - rounded * moments[0, 1:]
    fitted = torch.linalg.solve(rest, wanted.t()).t()
    others = _diffuse(fitted, _factor(rest), rounder, 1)
    return _restore(torch.cat([rounded, others], 1), order)


def _unit(moments: Tensor) -> float:
    """What to divide second moments by, as those of tiny inputs have no inverse in float32."""
    mean = float(moments.diagonal().mean())
    return mean if 0 < mean < _TINY else 1.0


def _ones(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse; more damping if there is no factor else."""
    extra = 0.0
    for _ in range(8):
        damped = moments + extra * _ones(moments)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        extra = max(10 * extra, 1e-4 * float(moments.diagonal().mean()))
    raise RuntimeError("the inputs' second moments have no inverse; give more calibration data")


def _diffuse(weight: Tensor, upper: Tensor, rounder: Rounder, offset: int) -> Tensor:
    """Round each column and spread its error over those after it.

    Columns are kept as rows of a transposed copy, contiguous in memory.
    """
    left = weight.t().contiguous()
    upper = upper / upper.diagonal()[:, None]
    rounded = torch.empty_like(left)
    columns = left.shape[0]
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        block, factors = left[start:end], upper[start:end, start:end]
        errors = torch.empty_like(block)
        for at in range(end - start):
            values = block[at]
            nearest = rounder(values, offset + start + at)
            rounded[start + at] = nearest
            torch.sub(values, nearest, out=errors[at])
            block[at + 1 :].addr_(factors[at, at + 1 :], errors[at], alpha=-1)
        left[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    return rounded.t()


def _restore(rounded: Tensor, order: Tensor) -> Tensor:
    """Columns back where they stood."""
    restored = torch.empty_like(rounded)
    restored[:, order] = rounded
    return restored
