"""Scales and zero points, read from the quantize and dequantize nodes of a converted graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from quark_core.quantized import Encoding
from quark_core.spec import Role
from quark_pt2e.graph.coverage import WEIGHTED, format_name

Place = tuple[str, str]
"""Where a node is: path of the branch's graph (empty at the top), and its name there."""


@dataclass(frozen=True)
class Conversion:
    """The numbers of one quantize or dequantize node.

    Attributes:
        scale, zero_point: Tensors; None where they are computed from each input.
        low, high: Smallest and largest code.
        dtype: In which codes are stored.
        axis: Axis of the channels, or None for one scale.
    """

    scale: torch.Tensor | None
    zero_point: torch.Tensor | None
    low: int
    high: int
    dtype: torch.dtype
    axis: int | None


def find(graph: fx.GraphModule, place: Place) -> fx.Node | None:
    """The node at a place, or None."""
    owner = owner_of(graph, place[0])
    return next((node for node in owner.graph.nodes if node.name == place[1]), None)


def owner_of(graph: fx.GraphModule, branch: str) -> fx.GraphModule:
    """The graph of a branch, by its path; the graph itself for the empty path."""
    owner = graph.get_submodule(branch) if branch else graph
    assert isinstance(owner, fx.GraphModule)
    return owner


def is_quantize(node: Any) -> bool:
    """Whether the node turns real values into codes."""
    return _named(node, "quantize_")


def is_dequantize(node: Any) -> bool:
    """Whether the node turns codes into real values."""
    return _named(node, "dequantize_")


def conversion(node: fx.Node) -> Conversion | None:
    """The numbers of a quantize or dequantize node, or None for operations of another kind."""
    name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
    args: Sequence[Any] = node.args
    axis: int | None = None
    if name.endswith("_per_tensor"):
        scale, zero, low, high, dtype = args[1:6]
    elif name.endswith("_per_channel"):
        scale, zero, axis, low, high, dtype = args[1:7]
    else:
        return None
    return Conversion(
        _value(node, scale, torch.float32),
        _value(node, zero, torch.int64),
        int(low),
        int(high),
        dtype,
        axis,
    )


def read(graph: fx.GraphModule, layers: Mapping[str, tuple[str, Place]]) -> list[Encoding]:
    """The encodings of a converted graph.

    Args:
        graph: The graph with quantize and dequantize nodes.
        layers: Operation and place of each layer, by name.
    """
    found = []
    index = {
        branch: _by_name(graph, branch) for branch in {place[0] for _, place in layers.values()}
    }
    for name, (op, place) in layers.items():
        node = index[place[0]].get(place[1])
        if node is not None:
            found += list(_of_node(name, op, node))
    return found


def quantized_output(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The quantize node that takes a node's output, and a dequantize node after it."""
    for user in node.users:
        if is_quantize(user):
            for after in user.users:
                if is_dequantize(after):
                    return user, after
    return None


def _by_name(graph: fx.GraphModule, branch: str) -> dict[str, fx.Node]:
    return {node.name: node for node in owner_of(graph, branch).graph.nodes}


def _of_node(name: str, op: str, node: fx.Node) -> Iterator[Encoding]:
    weight, bias = WEIGHTED.get(op, (None, None))
    inputs = 0
    for position, argument in _arguments(node.args):
        if not is_dequantize(argument):
            continue
        numbers = conversion(argument)
        if numbers is None:
            continue
        role: Role = "weight" if position == weight else "bias" if position == bias else "input"
        suffix = ""
        if role == "input":
            suffix = f":{inputs}" if inputs else ""
            inputs += 1
        yield _encoding(f"{name}.{role}{suffix}", name, role, numbers)
    after = quantized_output(node)
    numbers = conversion(after[0]) if after is not None else None
    if numbers is not None:
        yield _encoding(f"{name}.output", name, "output", numbers)


def _arguments(args: Sequence[Any]) -> Iterator[tuple[int, fx.Node]]:
    for position, argument in enumerate(args):
        if isinstance(argument, fx.Node):
            yield position, argument
        elif isinstance(argument, list | tuple):
            for item in argument:
                if isinstance(item, fx.Node):
                    yield position, item


def _encoding(tensor: str, layer: str, role: Role, numbers: Conversion) -> Encoding:
    scale, zero = numbers.scale, numbers.zero_point
    low = high = None
    if scale is not None and zero is not None:
        low, high = (numbers.low - zero) * scale, (numbers.high - zero) * scale
    symmetric = zero is not None and numbers.low < 0 and not bool(zero.any())
    return Encoding(
        tensor=tensor,
        layer=layer,
        role=role,
        format=format_name(numbers.dtype, numbers.low, numbers.high),
        granularity="tensor" if numbers.axis is None else "channel",
        axis=numbers.axis,
        symmetric=symmetric,
        dynamic=scale is None,
        scale=scale,
        zero_point=zero,
        min=low,
        max=high,
    )


def _value(node: fx.Node, value: Any, dtype: torch.dtype) -> torch.Tensor | None:
    if isinstance(value, fx.Node):
        if value.op != "get_attr":
            return None  # computed from each input
        tensor = held(node.graph.owning_module, str(value.target))
        return None if tensor is None else tensor.detach().clone()
    return torch.tensor(value, dtype=dtype)


def held(owner: Any, target: str) -> torch.Tensor | None:
    """The tensor that a graph holds under a dotted name, or None."""
    for part in target.split("."):
        owner = getattr(owner, part, None)
    return owner if isinstance(owner, torch.Tensor) else None


def _named(node: Any, start: str) -> bool:
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return str(node.target._schema.name).rpartition("::")[2].startswith(start)
