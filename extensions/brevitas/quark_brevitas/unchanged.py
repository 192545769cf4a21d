"""Whether passes over the float model left its outputs as they were."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quark_core.batch import Batch, main_output
from quark_core.errors import QuantizationError

_MAX_CHANGE = 1e-3
_UNITS = 8
"""How many units of rounding, in a number format with fewer digits, outputs may move by."""


def output_of(model: nn.Module, example: Batch | None) -> Tensor | None:
    """The float model's main output on one sample, or None without a batch."""
    if example is None:
        return None
    with torch.no_grad():
        return main_output(example.first().run(model)).detach()


def compared(
    before: Tensor | None, after: Tensor | None, done: str, *, where: str, fix: str
) -> list[str]:
    """A sentence about how far outputs moved, by rounding alone if all is well.

    Args:
        before: Output before the passes.
        after: Output after them.
        done: What they do, such as "rotating".
        where: The options that ask for them.
        fix: What to do if outputs have changed.

    Raises:
        QuantizationError: They have changed by more than 0.1 %, or by what rounding to the
            model's own format explains.
    """
    if before is None or after is None:
        return []
    exact = before.double()
    change = float((after.double() - exact).norm() / exact.norm().clamp_min(1e-30))
    if not change <= max(_MAX_CHANGE, _UNITS * torch.finfo(before.dtype).eps):
        raise QuantizationError(
            f"the float model's outputs changed by {change:.1%} of their size, where they should "
            "stay",
            where=where,
            fix=fix,
        )
    return [f"{done} moved the float model's outputs by {change:.1e}"]
