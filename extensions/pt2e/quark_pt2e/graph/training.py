"""Graphs that can be trained: made ready for annotation, and switched between their two modes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

_SWITCHES = ("train", "training")
"""What operations that compute differently in training call the argument that says so."""


def drop_counters(graph: fx.GraphModule) -> None:
    """Remove the counting of batches that batch norms do on the side.

    Nothing reads the count, quantizers take it for an addition, and it keeps a convolution apart
    from its batch norm where patterns are sought among neighbours.
    """
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten.add_.Tensor and not node.users:
            source = node.args[0]
            if isinstance(source, fx.Node) and source.op == "get_attr":
                graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def hoist_constants(graph: fx.GraphModule) -> None:
    """Move parameters before the operations, so that patterns stand next to each other."""
    nodes = list(graph.graph.nodes)
    constants = [node for node in nodes if node.op == "get_attr"]
    first = next((node for node in nodes if node.op != "get_attr"), None)
    if first is not None:
        for node in constants:
            first.prepend(node)
    graph.graph.lint()
    graph.recompile()


def fake_quantizers(graph: nn.Module) -> list[FakeQuantizeBase]:
    """The modules that both watch and round a tensor."""
    return [module for module in graph.modules() if isinstance(module, FakeQuantizeBase)]


def set_mode(graph: fx.GraphModule, *, training: bool, observing: bool) -> None:
    """Switch batch norms and dropouts of a graph, and whether ranges follow the data.

    The operations' own arguments are changed: torchao's switch replaces every dropout
    probability by 0.5.
    """
    for part in graph.modules():
        if isinstance(part, fx.GraphModule):
            for node, position in _switches(part):
                node.args = (*node.args[:position], training, *node.args[position + 1 :])
            part.recompile()
    for fake in fake_quantizers(graph):
        fake.enable_observer(observing)


def _switches(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, int]]:
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            for position, argument in enumerate(node.target._schema.arguments):
                if argument.name in _SWITCHES and position < len(node.args):
                    yield node, position
