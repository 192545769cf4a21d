"""SVDQuant: the largest directions of a weight stay float beside the quantized rest.

A weight W [outputs, inputs] becomes R + L2 @ L1, where L2 @ L1 is its best approximation of a given
rank; only R is quantized, whose range is smaller. Source: Li et al., SVDQuant (arXiv 2411.05007),
section 4.2; smoothing, its first half, is activation equalization here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn


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

    def forward(self, x: Tensor) -> Tensor:
        """Run both."""
        branch = nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        return cast("Tensor", self.layer(x)) + branch


def put_branches(model: nn.Module, paths: Iterable[str], rank: int) -> None:
    """Split the weights of Linear layers, in place.

    Args:
        model: The float model.
        paths: Where the layers are.
        rank: Rank of the float branch; a layer with fewer inputs or outputs gets as many.
    """
    for path in paths:
        layer = model.get_submodule(path)
        weight = layer.get_parameter("weight").detach()
        left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
        up = left[:, :rank]
        down = values[:rank, None] * right[:rank]
        rest = weight.double() - up @ down
        layer.weight = nn.Parameter(rest.to(weight.dtype))
        branch = LowRankBranch(
            layer, down.to(weight.dtype).contiguous(), up.to(weight.dtype).contiguous()
        )
        model.set_submodule(path, branch.train(layer.training))
