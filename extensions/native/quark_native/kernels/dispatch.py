"""Which kernel computes a tensor: by device, dtype and format."""

from __future__ import annotations

from torch import Tensor

from quark_native.formats.base import Format, Parameters, require_floating


def fake_quantize(
    fmt: Format, x: Tensor, parameters: Parameters | None, out: Tensor | None, seed: int
) -> Tensor:
    """:meth:`Format.fake_quantize` by the fastest kernel that computes it."""
    require_floating(fmt.number.name, x)
    found = fmt.specification(x, parameters, seed)
    return found if out is None else out.copy_(found)
