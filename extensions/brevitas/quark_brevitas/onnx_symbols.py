"""What torch's ONNX exporter lacks for attention.

The masks of transformers' models look for packed sequences: ``(positions.diff(prepend=...) !=
1).cumsum()``. The exporter has no ``diff``, and writes a ``CumSum`` of truth values, which ONNX
does not allow. Brevitas's attention looks for rows that are masked as a whole, by ``isneginf``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

OPSET = 17
"""Of the files the backend writes."""
_INT64 = 7
"""ONNX's number of the type."""


@contextmanager
def symbols() -> Iterator[None]:
    """All of them are known for a while."""
    from torch.onnx.utils import register_custom_op_symbolic, unregister_custom_op_symbolic

    known: dict[str, Callable[..., Any]] = {
        "aten::diff": _diff,
        "aten::cumsum": _cumsum,
        "aten::isneginf": _isneginf,
    }
    for name, function in known.items():
        register_custom_op_symbolic(name, function, OPSET)
    try:
        yield
    finally:
        for name in known:
            unregister_custom_op_symbolic(name, OPSET)


def _isneginf(graph: Any, x: Any) -> Any:
    """Whether each element is minus infinity."""
    return graph.op("IsInf", x, detect_positive_i=0)


def _diff(graph: Any, x: Any, order: Any, axis: Any, before: Any, after: Any) -> Any:
    """Each element minus the one before it."""
    helper: Any
    from torch.onnx import symbolic_helper as helper

    at = helper._get_const(axis, "i", "axis")
    if helper._get_const(order, "i", "order") != 1 or not helper._is_none(after):
        return helper._unimplemented("diff", "of higher order, or with append")
    if not helper._is_none(before):
        x = graph.op("Concat", before, x, axis_i=at)

    def part(start: int, end: int) -> Any:
        bounds = [graph.op("Constant", value_t=torch.tensor([end])) for end in (start, end, at)]
        return graph.op("Slice", x, *bounds)

    return graph.op("Sub", part(1, torch.iinfo(torch.int64).max), part(0, -1))


def _cumsum(graph: Any, x: Any, axis: Any, kind: Any) -> Any:
    """Sums up to each element; truth values are counted."""
    from torch.onnx import symbolic_opset11

    if x.type().scalarType() == "Bool":
        x = graph.op("Cast", x, to_i=_INT64)
    return symbolic_opset11.cumsum(graph, x, axis, kind)
