"""The Triton kernels on GPU tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from quark_native.kernels.call import Call

if TYPE_CHECKING:
    from quark_native.formats.base import Format, Parameters
    from quark_native.formats.layout import Layout


def refusal(fmt: Format, call: Call | None, x: Tensor, parameters: Parameters | None) -> str | None:
    """Why the kernels do not compute this, or None if they do."""
    return "there are no Triton kernels"


def fake_quantize(
    call: Call,
    layout: Layout,
    x: Tensor,
    parameters: Parameters | None,
    out: Tensor | None,
    seed: int,
) -> Tensor:
    """Quantize and dequantize x."""
    raise NotImplementedError
