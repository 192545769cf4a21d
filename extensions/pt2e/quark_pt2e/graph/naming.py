"""From the nodes of an exported graph to what rules select."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from quark_core.errors import UnmatchedRuleError, did_you_mean
from quark_core.selection import Target
from quark_core.targets import type_names

# torch.export counts the calls of a module that is called several times ("block@1"); bytecode
# tracing puts a root of its own before the modules that a branch calls.
_CALL = re.compile(r"@\d+")
_ROOTS = ("L['self'].", "_export_root.")
_ENDS = {"placeholder": "input", "output": "output"}


@dataclass(frozen=True)
class Site:
    """A node of a graph, as rules and plans see it.

    Attributes:
        node: The node.
        target: Its name (the module's, where the module is this one operation), types, operation
            and the modules around it.
        path: The innermost module it stems from; empty for the model itself.
        branch: Dotted path of the graph's submodule it lies in; empty at the top.
    """

    node: fx.Node
    target: Target
    path: str
    branch: str = ""


class Namer:
    """Names the nodes of graphs exported from one model."""

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        self._types = {name: type_names(type(module)) for name, module in modules.items()}
        self._classes = {
            name: cls
            for cls in {type(module) for module in modules.values()}
            for name in (cls.__name__, f"{cls.__module__}.{cls.__qualname__}")
        }

    def class_named(self, name: str) -> type:
        """The class of some module of the model, by its bare or qualified name.

        Raises:
            UnmatchedRuleError: No module is of exactly that class.
        """
        for key in (name, name.rpartition(".")[2]):
            if key in self._classes:
                return self._classes[key]
        raise UnmatchedRuleError(
            f"no module is exactly of class {name!r}: ExecuTorch's precedence knows no subclasses",
            where="quantizer.rules",
            fix=did_you_mean(name, self._classes) or "Drop precedence: executorch",
        )

    def sites(self, graph_module: fx.GraphModule) -> list[Site]:
        """Every input, operation and output of a graph and its branches, in order."""
        found: list[Site] = []
        taken: Counter[str] = Counter()
        self._visit(graph_module, "", "", found, taken)
        return found

    def _visit(
        self,
        graph: fx.GraphModule,
        branch: str,
        prefix: str,
        found: list[Site],
        taken: Counter[str],
    ) -> None:
        nodes = [node for node in graph.graph.nodes if _counts(node, top=not branch)]
        # Nodes a module: its own, and those of the modules within it.
        crowd = Counter(scope for node in nodes for scope in scope_names(module_path(node)))
        for node in nodes:
            path = module_path(node)
            alone = bool(path) and crowd[path] == 1
            op = op_name(node)
            # An input has a name of its own in the model's signature.
            wanted = node.name if node.op == "placeholder" else op
            name = path if alone else ".".join(part for part in (path or prefix, wanted) if part)
            if taken[name]:
                base, name = name, f"{name}_{taken[name]}"
                taken[base] += 1
            taken[name] += 1
            found.append(Site(node, self._target(node, name, op, path, alone), path, branch))
            for side, label, inner in branches(node):
                self._visit(
                    inner, f"{branch}.{side}" if branch else side, f"{name}.{label}", found, taken
                )

    def _target(self, node: fx.Node, name: str, op: str, path: str, alone: bool) -> Target:
        if node.op in _ENDS:
            return Target(name, (), op, (_ENDS[node.op],), node=node.name)
        around = scope_names(path)
        scopes = tuple((scope, self._types.get(scope, ())) for scope in around)
        types = self._types.get(path, ()) if alone else ()
        return Target(name, types, op, (), scopes, node.name)


def branches(node: fx.Node) -> Iterator[tuple[str, str, fx.GraphModule]]:
    """The branches of a torch.cond node: attribute that holds it, its label, its graph."""
    if node.op == "call_function" and node.target is torch.ops.higher_order.cond:
        owner = node.graph.owning_module
        for label, argument in zip(("true", "false"), node.args[1:3], strict=True):
            assert isinstance(argument, fx.Node)
            assert owner is not None
            inner = owner.get_submodule(str(argument.target))
            assert isinstance(inner, fx.GraphModule)
            yield str(argument.target), label, inner


def op_name(node: fx.Node) -> str:
    """The operation as rules select it: ``conv2d``, ``linear``, ``add``, ``input``, ``output``."""
    if node.op in _ENDS:
        return _ENDS[node.op]
    if node.target is operator.getitem:
        return "getitem"
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name).rpartition("::")[2].rstrip("_")
    return str(getattr(node.target, "__name__", node.target)).rpartition(".")[2]


def module_path(node: fx.Node) -> str:
    """Dotted name of the innermost module that the node stems from, or an empty string."""
    stack = node.meta.get("nn_module_stack") or {}
    last = next(reversed(list(stack.values())), ("", ""))[0]
    path = _CALL.sub("", str(last))
    for root in _ROOTS:
        path = path.removeprefix(root)
    return "" if path == "_export_root" else path


def scope_names(path: str) -> list[str]:
    """The model itself and the modules down to ``path``, outermost first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]


def is_float(node: fx.Node) -> bool:
    """Whether the node yields a floating-point tensor, or several of which one is."""
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(item, torch.Tensor) and item.is_floating_point() for item in values)


def _counts(node: fx.Node, *, top: bool) -> bool:
    # Within a branch, inputs and outputs only pass on what the graph around it already names.
    return node.op == "call_function" or (top and node.op in _ENDS)
