"""Preparing and converting a graph and the branches of its torch.cond, with sample counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from quark_pt2e.graph.naming import branches

Change = Callable[[fx.GraphModule], fx.GraphModule]


def prepare_all(
    graph: fx.GraphModule, prepare: Change, *, into_branches: bool = True
) -> fx.GraphModule:
    """Apply ``prepare`` to a graph and then, unless told not to, to each branch within it."""
    prepared = prepare(graph)
    if not into_branches:
        return prepared
    for node in list(prepared.graph.nodes):
        for attribute, _, inner in list(branches(node)):
            prepared.set_submodule(attribute, prepare_all(inner, prepare), strict=True)
    return prepared


def convert_all(
    graph: fx.GraphModule, convert: Change, *, into_branches: bool = True
) -> fx.GraphModule:
    """Apply ``convert`` to each branch, innermost first, and then to the graph."""
    if not into_branches:
        return convert(graph)
    done = [
        (attribute, convert_all(inner, convert))
        for node in list(graph.graph.nodes)
        for attribute, _, inner in list(branches(node))
    ]
    converted = convert(graph)
    for attribute, inner in done:
        converted.set_submodule(attribute, inner, strict=True)
    return converted


class BranchCounter:
    """Counts how many samples each branch of a prepared graph sees."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.seen: dict[str, int] = {}
        self._handles: list[Any] = []
        self._watch(graph, "")

    def close(self) -> None:
        """Stop counting."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, graph: fx.GraphModule, prefix: str) -> None:
        for node in graph.graph.nodes:
            for _, label, inner in branches(node):
                name = f"{prefix}{node.name}.{label}"
                self.seen[name] = 0
                self._handles.append(inner.register_forward_pre_hook(self._counting(name)))
                self._watch(inner, f"{name}.")

    def _counting(self, name: str) -> Callable[[Any, Any], None]:
        def count(_module: Any, args: Any) -> None:
            first = next((arg for arg in args if isinstance(arg, torch.Tensor) and arg.ndim), None)
            self.seen[name] += 1 if first is None else int(first.shape[0])

        return count
