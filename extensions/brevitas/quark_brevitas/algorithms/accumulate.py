"""AXE: codes whose sums of products fit a register (Colbert et al. 2024, arXiv 2409.17092).

Inputs have codes from ``low`` to ``high``. With p and n the sums of the positive and negative codes
of a tile of weights, products sum up to at most high p + low n and at least low p + high n, so the
next code c may only be so large that both stay within +-(2^(bits - 1) - 1). Before that clamp,
magnitudes are cut so that a tile's codes, taken from their mean, would sum up to what the register
holds; otherwise the first columns would use it up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quark_brevitas.algorithms.balls import l1_cut
from quark_brevitas.algorithms.grid import Grid, Rounder
from quark_brevitas.options import Accumulator
from quark_core.spec import TensorSpec

Limit = Callable[[Rounder, Tensor], Rounder]
"""From a rounder, and the order of columns, to one that keeps to a register."""


def input_codes(spec: TensorSpec) -> tuple[int, int]:
    """The smallest and largest code of an integer input."""
    bits = spec.number_format.bits
    if spec.symmetric and spec.number_format.signed:
        return -(1 << bits - 1), (1 << bits - 1) - 1
    # Brevitas counts asymmetric codes from zero.
    return 0, (1 << bits) - 1


def limit(
    weight: Tensor, grid: Grid, rows: slice, codes: tuple[int, int], register: Accumulator
) -> Limit:
    """What keeps the rows of one weight to a register.

    Args:
        weight: The float weight, [rows, columns].
        grid: What it can be; symmetric integers.
        rows: Which rows of the grid these are.
        codes: Smallest and largest code of an input.
        register: Its bits, and the products it sums up.
    """
    low, high = codes
    largest = float(2 ** (register.bits - 1) - 1)
    count, columns = weight.shape
    tile = register.tile or columns
    scale = grid.scale[rows] if grid.scale.shape[0] > 1 else grid.scale
    scale = scale.expand(count, columns)
    cuts = [
        l1_cut((part - part.mean(1, keepdim=True)).abs(), 2 * largest / (high - low))[:, 0]
        for part in torch.split(weight / scale, tile, dim=1)
    ]

    def limited(rounder: Rounder, order: Tensor) -> Rounder:
        places = order.tolist()
        positive = [weight.new_zeros(count) for _ in cuts]
        negative = [weight.new_zeros(count) for _ in cuts]

        def rounded(values: Tensor, at: int) -> Tensor:
            part, step = places[at] // tile, scale[:, places[at]]
            p, n = positive[part], negative[part]
            above, below = largest - high * p - low * n, largest + low * p + high * n
            up, down = above / high, -below / high
            if low:
                up, down = torch.minimum(up, below / -low), torch.maximum(down, -above / -low)
            wanted = values / step
            wanted = wanted.sign() * (wanted.abs() - cuts[part]).clamp_(min=0)
            wanted = torch.minimum(torch.maximum(wanted, down.ceil()), up.floor())
            found = rounder(wanted * step, at)
            chosen = (found / step).round_()
            positive[part] += chosen.clamp(min=0)
            negative[part] += chosen.clamp(max=0)
            return found

        return rounded

    return limited
