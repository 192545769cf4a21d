"""Graphs for any batch size: mending what passes leave behind, and proving the result."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from quark_core.batch import Batch, leaves
from quark_core.errors import QuantizationError
from quark_pt2e.graph.training import fake_quantizers

_RESHAPES = (
    torch.ops.aten.reshape.default,
    torch.ops.aten.view.default,
    torch.ops.aten.view_copy.default,
)


def require_any_size(graph: fx.GraphModule, example: Batch) -> None:
    """Make a graph take any batch size, or refuse it.

    Passes that rewrite graphs sometimes write symbolic sizes into them that nothing defines
    when the graph runs, or the example's own sizes.

    Raises:
        QuantizationError: Names what is wrong.
    """
    where, fix = "batch: dynamic", "Write batch: static"
    for part in graph.modules():
        if isinstance(part, fx.GraphModule):
            _free(part)
    # A copy: observers must not see this.
    trial = copy.deepcopy(graph)
    for fake in fake_quantizers(trial):
        # Ranges that two samples have set would round them differently.
        fake.enable_fake_quant(False)
    with torch.no_grad():
        several, one = list(leaves(example.run(trial))), list(leaves(example.first().run(trial)))
    for whole, first in zip(several, one, strict=True):
        same = whole.shape == first.shape or whole.shape[1:] == first.shape[1:]
        if not same or not torch.allclose(
            whole[: len(first)].double() if whole.ndim else whole.double(),
            first.double(),
            rtol=1e-2,
            atol=1e-2 * float(whole.double().abs().max().clamp(min=1e-6)),
            equal_nan=True,
        ):
            raise QuantizationError(
                "a sample's output depends on the size of its batch", where=where, fix=fix
            )


def _free(graph: fx.GraphModule) -> None:
    """Replace symbolic sizes among a graph's arguments by something that is computed."""
    changed = False
    for node in list(graph.graph.nodes):
        symbols = [item for item in pytree.tree_leaves(node.args) if _is_symbol(item)]
        if not symbols:
            continue
        if node.target in _RESHAPES and len(symbols) == 1:
            # The one size left open follows from the others.
            node.args = pytree.tree_map(lambda item: -1 if _is_symbol(item) else item, node.args)
        else:
            sizes = {str(symbol): _size_node(graph, symbol, node) for symbol in symbols}
            node.args = pytree.tree_map(
                lambda item, sizes=sizes: sizes[str(item)] if _is_symbol(item) else item,
                node.args,
            )
        changed = True
    if changed:
        graph.graph.lint()
        graph.recompile()


def _size_node(graph: fx.GraphModule, symbol: torch.SymInt, user: fx.Node) -> fx.Node:
    """A node that reads a size off the input it belongs to."""
    for node in graph.graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if _is_symbol(size) and str(size) == str(symbol):
                with graph.graph.inserting_before(user):
                    return graph.graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
    raise QuantizationError(
        f"a pass left the undefined size {symbol} in node {user.name!r}",
        where="batch: dynamic",
        fix="Write batch: static",
    )


def _is_symbol(item: Any) -> bool:
    return isinstance(item, torch.SymInt)
