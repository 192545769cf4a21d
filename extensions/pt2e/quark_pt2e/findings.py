"""What to tell the user about a graph before it is quantized."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import fx

from quark_pt2e.graph.encodings import held
from quark_pt2e.graph.naming import branches, module_path, op_name

_NORMS = ("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm")


def warnings(graph: fx.GraphModule, *, into_branches: bool) -> tuple[str, ...]:
    """Sentences on infinities and on parameters that pass through torch.cond.

    Args:
        graph: The exported graph, before anything is annotated.
        into_branches: Whether branches are quantized.
    """
    found = []
    places = list(dict.fromkeys(_infinities(graph)))
    if places:
        found.append(
            f"infinite constants ({', '.join(places[:4])}) have no place in an integer range: "
            "a large finite number, such as -100 for attention masks, keeps the others' resolution"
        )
    for node in graph.graph.nodes:
        if into_branches and any(True for _ in branches(node)) and _parameters(graph, node):
            found.append(
                f"the branches of {node.name} read their weights through torch.cond, where they "
                "get activation ranges: check the accuracy of these layers"
            )
    return tuple(found)


def batch_norms(graph: fx.GraphModule) -> dict[str, str]:
    """For each node whose only user is a batch norm, that batch norm's module."""
    found = {}
    for node in graph.graph.nodes:
        if op_name(node) in _NORMS and isinstance(node.args[0], fx.Node):
            before, path = node.args[0], module_path(node)
            if path and len(before.users) == 1:
                found[before.name] = path
    return found


def _infinities(graph: fx.GraphModule) -> Iterator[str]:
    for node in graph.graph.nodes:
        arguments = [*node.args, *node.kwargs.values()]
        if any(isinstance(value, float) and math.isinf(value) for value in arguments):
            yield node.name
        if node.op == "get_attr":
            tensor = held(graph, str(node.target))
            if tensor is not None and bool(tensor.isinf().any()):
                yield str(node.target)
        for _, _, inner in branches(node):
            yield from _infinities(inner)


def _parameters(graph: fx.GraphModule, cond: fx.Node) -> bool:
    operands = cond.args[3] if len(cond.args) > 3 else ()
    return isinstance(operands, list | tuple) and any(
        isinstance(operand, fx.Node)
        and operand.op == "get_attr"
        and held(graph, str(operand.target)) is not None
        for operand in operands
    )
