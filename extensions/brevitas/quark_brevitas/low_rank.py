"""SVDQuant: the largest directions of a weight stay float beside the quantized rest.

A weight W [outputs, inputs] becomes R + L2 @ L1, where L2 @ L1 is its best approximation of a given
rank; only R is quantized, whose range is smaller. Source: Li et al., SVDQuant (arXiv 2411.05007),
section 4.2; smoothing, its first half, is activation equalization here.

Further iterations take L2 @ L1 anew from what quantizing left over, W - Q(R), and R from
W - L2 @ L1; the one with the smallest ||R - Q(R)|| is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from quark_brevitas.options import LowRank


class LowRankBranch(nn.Module):
    """A layer and two thin float layers beside it; outputs add up.

    Args:
        layer: The layer, which keeps the rest of the weight.
        down: Float weight [rank, inputs].
        up: Float weight [outputs, rank].
    """

    def __init__(self, layer: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self, input: Tensor) -> Tensor:
        """Run both."""
        branch = nn.functional.linear(nn.functional.linear(input, self.down), self.up)
        return cast("Tensor", self.layer(input)) + branch


def put_branches(
    model: nn.Module,
    paths: Mapping[str, str],
    options: LowRank,
    rounded: Callable[[str, Tensor], Tensor],
) -> None:
    """Split the weights of Linear layers, in place.

    Args:
        model: The float model.
        paths: Where the layers are, by name.
        options: Rank of the float branch (a layer with fewer inputs or outputs gets as many), and
            how often it is taken anew.
        rounded: Quantizes and dequantizes a weight with the quantizer of a layer.
    """
    for name, path in paths.items():
        layer = model.get_submodule(path)
        weight = layer.get_parameter("weight").detach()
        rest, up, down = _split(weight, weight, options.rank)
        if options.iterations > 1:
            again = partial(rounded, name)
            rest, up, down = _refined(weight, (rest, up, down), options, again)
        layer.weight = nn.Parameter(rest)
        branch = LowRankBranch(layer, down, up)
        model.set_submodule(path, branch.train(layer.training))


_Parts = tuple[Tensor, Tensor, Tensor]
"""What is quantized [outputs, inputs], and the branch: [outputs, rank] and [rank, inputs]."""


def _split(weight: Tensor, followed: Tensor, rank: int) -> _Parts:
    """A weight as a rest and the best approximation of another matrix."""
    left, values, right = torch.linalg.svd(followed.double(), full_matrices=False)
    up = left[:, :rank]
    down = values[:rank, None] * right[:rank]
    rest = weight.double() - up @ down
    kind = weight.dtype
    return rest.to(kind), up.to(kind).contiguous(), down.to(kind).contiguous()


def _refined(
    weight: Tensor, first: _Parts, options: LowRank, rounded: Callable[[Tensor], Tensor]
) -> _Parts:
    """The best of several iterations."""
    parts = best = first
    codes = rounded(parts[0])
    least = (parts[0] - codes).norm()
    for _ in range(options.iterations - 1):
        parts = _split(weight, weight - codes, options.rank)
        codes = rounded(parts[0])
        error = (parts[0] - codes).norm()
        if error < least:
            least, best = error, parts
    return best
