"""Capturing a model with torch.export, for any batch size where that works."""

from __future__ import annotations

import contextlib
import traceback
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from quark_core.batch import Batch
from quark_core.errors import QuantizationError
from quark_pt2e.graph.naming import branches, module_path

_ROOMS = ("/torch/", "/torchao/", "/executorch/", "/quark_pt2e/", "/quark_core/")
_LOOPS = ("while_loop", "map_impl", "scan", "associative_scan")


@dataclass
class Captured:
    """An exported model.

    Attributes:
        graph: The program as a graph that can be run, without shape guards.
        dynamic: Whether it takes any batch size; otherwise ``size`` samples.
        size: Samples of the batch it was exported with.
        example: That batch.
    """

    graph: fx.GraphModule
    dynamic: bool
    size: int
    example: Batch


def capture(
    model: nn.Module,
    example: Batch,
    *,
    dynamic: bool,
    strict: bool | None,
    training: bool = False,
) -> Captured:
    """Export a model with the example's shapes.

    Args:
        model: Its parameters become the graph's.
        example: One batch.
        dynamic: Leave the number of samples open; otherwise the graph takes one sample.
        strict: As torch.export has it; None decides by whether branches need it.
        training: Keep batch norms and dropouts such that they can be trained.

    Raises:
        QuantizationError: torch.export refuses the model.
    """
    for module in model.modules():
        module.training = training
    batch = example.beside(model)
    batch = at_least_two(batch) if dynamic else batch.first()
    shapes: Any = None
    if dynamic:
        shapes = open_batch(batch)
    graph = _export(model, batch, shapes, bool(strict))
    if strict is None and _nameless_branches(graph):
        # Names are a convenience; the graph at hand computes the same.
        with contextlib.suppress(QuantizationError):
            graph = _export(model, batch, shapes, True)
    return Captured(graph, dynamic, len(batch), batch)


def open_batch(batch: Batch) -> Any:
    """Shapes for torch.export that leave the number of samples open."""
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for leaf in batch.tensors():
        if leaf.ndim and leaf.shape[0] == len(batch):
            shapes[leaf] = {0: torch.export.Dim.AUTO}
    return shapes


def at_least_two(batch: Batch) -> Batch:
    """The batch with a single sample doubled: an axis of length one counts as a constant."""
    size = len(batch)
    if size != 1:
        return batch
    return batch.map(
        lambda leaf: torch.cat([leaf, leaf]) if leaf.ndim and leaf.shape[0] == size else leaf
    )


def require_supported(graph: fx.GraphModule) -> None:
    """Refuse control flow that no PT2E quantizer carries through.

    Raises:
        QuantizationError: Names the operation.
    """
    for node in graph.graph.nodes:
        name = str(getattr(node.target, "__name__", ""))
        if isinstance(node.target, torch._ops.HigherOrderOperator) and name in _LOOPS:
            raise QuantizationError(
                f"{name} cannot be quantized: its body would stay float or fail in calibration",
                where=f"node {node.name!r}",
                fix="Unroll the loop, or leave it out of the model; torch.cond is supported",
            )
        for _, _, inner in branches(node):
            require_supported(inner)


def _export(model: nn.Module, batch: Batch, shapes: Any, strict: bool) -> fx.GraphModule:
    try:
        with torch.no_grad():
            program = torch.export.export(
                model,
                tuple(batch.args),
                dict(batch.kwargs),
                dynamic_shapes=shapes,
                strict=strict,
            )
            # Guards are code that the quantizers' passes cannot rewrite.
            graph = program.module(check_guards=False)
    except Exception as error:
        raise _refusal(error, model) from error
    assert isinstance(graph, fx.GraphModule)
    return graph


def _refusal(error: Exception, model: nn.Module) -> QuantizationError:
    """torch.export's error in one line, with the line of the model that caused it."""
    text = f"{type(error).__name__}: {error}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(room in frame.filename for room in _ROOMS) and frame.filename[:1] != "<"
    ]
    where = f"model {type(model).__name__}"
    if frames:
        where += f", {frames[-1].filename}:{frames[-1].lineno}"
        if frames[-1].line:
            where += f" `{frames[-1].line}`"
    if "data-dependent" in text or "DataDependent" in text or "GuardOnData" in text:
        return QuantizationError(
            "the model branches in Python on the values of a tensor",
            where=where,
            fix="Write the branch with torch.cond(predicate, true_function, false_function, "
            "operands), or make the condition constant",
        )
    return QuantizationError(
        "torch.export refuses the model",
        where=where,
        cause=next(iter(text.strip().splitlines()), "")[:300],
        fix="Rewrite that part, or try strict: true, or batch: static",
    )


def _nameless_branches(graph: fx.GraphModule) -> bool:
    return any(
        all(not module_path(part) for part in inner.graph.nodes)
        for node in graph.graph.nodes
        for _, _, inner in branches(node)
    )
