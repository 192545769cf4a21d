"""The graph of a model that cannot be traced: recorded while one batch runs.

Brevitas finds the layers that share a rotation or a norm by walking a graph. Tracers stop at
models that are called by keyword or branch on their inputs, as those of transformers do. What a
walk needs is less than a tracer gives: which layer's output reaches which layer, through what.
That is recorded here from one real call, so layers keep their names and the model stays as it is.
"""

from __future__ import annotations

import copy
import operator
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from quark_core.batch import Batch, leaves

SHAPE = "shape"
"""Where a recorded node keeps the shape of its output, if that is one tensor."""
_ROWS = (tuple, list, torch.Size)
_CONSTANTS = (int, float, str, bool, slice, type(Ellipsis))


class GraphView:
    """A model and a graph of it, for code that walks graphs; it cannot be run.

    Args:
        model: The model.
        graph: Its graph; ``call_module`` nodes name the model's own modules.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.graph = graph
        self.viewed_model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.viewed_model, name)


def is_traced(model: nn.Module) -> bool:
    """Whether a model is a traced graph, of torch's class or Brevitas's own."""
    from brevitas.fx import GraphModule

    return isinstance(model, fx.GraphModule | GraphModule)


@contextmanager
def plain_norms(model: nn.Module) -> Iterator[None]:
    """For a while, norms of a library's own class are torch's RMSNorm with the same weight.

    Brevitas knows no others.
    """
    swapped: list[tuple[str, Any, nn.RMSNorm]] = []
    try:
        for name, module in list(model.named_modules()):
            if is_rms_norm(module) and not isinstance(module, nn.RMSNorm):
                weight = module.get_parameter("weight")
                plain = nn.RMSNorm(weight.shape[0], eps=epsilon(module))
                plain.weight = weight
                model.set_submodule(name, plain.train(module.training))
                swapped.append((name, module, plain))
        yield
    finally:
        for name, module, plain in swapped:
            module.weight = plain.weight
            model.set_submodule(name, module)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module divides by the root of the mean square and multiplies by its weight.

    Libraries have classes of their own for it, and some that multiply by one more than their
    weight: so it is tried out.
    """
    if isinstance(module, nn.RMSNorm):
        return module.elementwise_affine
    weight = getattr(module, "weight", None)
    alone = list(module.state_dict()) == ["weight"] and not list(module.children())
    if "RMSNorm" not in type(module).__name__ or not alone or weight is None or weight.ndim != 1:
        return False
    x = torch.linspace(-2, 3, weight.numel(), device=weight.device)[None]
    with torch.no_grad():
        expected = x * (x.square().mean() + epsilon(module)).rsqrt() * weight.float()
        found = copy.deepcopy(module).float()(x)
        return torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def epsilon(norm: nn.Module) -> float:
    """What a norm adds before it divides."""
    for name in ("eps", "variance_epsilon", "epsilon"):
        found = getattr(norm, name, None)
        if isinstance(found, float):
            return found
    return 1e-6


def record(model: nn.Module, batch: Batch) -> GraphView:
    """Run one sample through the model and write down what became of its tensors.

    Within :func:`plain_norms`, so that norms are known as such.
    """
    recorder = _Recorder(model)
    sample = batch.first()
    with torch.no_grad(), recorder.listening(), recorder:
        output = sample.run(model)
    found = [recorder.node(tensor) for tensor in leaves(output)]
    recorder.graph.output(tuple(found))
    return GraphView(model, recorder.graph)


def _is_leaf(module: nn.Module) -> bool:
    own = type(module).__module__.startswith("torch.nn.modules")
    return own and not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


class _Recorder(TorchFunctionMode):
    """Adds a node for each call of a layer, and for each torch function outside of layers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self._model = model
        self._nodes: dict[int, tuple[fx.Node, weakref.ref[Tensor]]] = {}
        self._inside = self._outside = 0

    def node(self, tensor: Tensor) -> fx.Node:
        """The node whose output a tensor is; a new placeholder for one that comes from outside."""
        known = self._nodes.get(id(tensor))
        if known is not None:
            return known[0]
        self._outside += 1
        node = self.graph.placeholder(f"outside_{self._outside}")
        node.meta[SHAPE] = tuple(tensor.shape)
        self._know(tensor, node)
        return node

    def _know(self, tensor: Tensor, node: fx.Node) -> None:
        """Remember whose output a tensor is for as long as it lives: others get its id then."""
        key = id(tensor)
        self._nodes[key] = node, weakref.ref(tensor, lambda _: self._nodes.pop(key, None))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        output = func(*args, **given)
        if not self._inside and any(True for _ in leaves(output)):
            self._add(func, args, given, output)
        return output

    def _add(self, func: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        name = getattr(func, "__name__", "function")
        if name == "__getitem__":
            self._put("call_function", operator.getitem, args, kwargs, output)
        elif name == "__get__":  # of a property, such as .T
            self._put("call_method", "property", args, kwargs, output)
        elif getattr(torch.Tensor, name, None) is func:
            self._put("call_method", name, args, kwargs, output)
        else:
            self._put("call_function", func, args, kwargs, output)

    def _put(self, kind: str, target: Any, args: Any, kwargs: Any, output: Any) -> None:
        def swap(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self.node(value)
            if isinstance(value, tuple | list):
                kind = list if type(value) is list else tuple
                return kind(map(swap, value)) if type(value) in _ROWS else None
            return value if isinstance(value, _CONSTANTS) else None

        node = self.graph.create_node(
            kind, target, tuple(map(swap, args)), {key: swap(one) for key, one in kwargs.items()}
        )
        for tensor in leaves(output):
            self._know(tensor, node)
        if isinstance(output, Tensor):
            node.meta[SHAPE] = tuple(output.shape)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take each layer for one node, whatever it computes inside."""
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                if _is_leaf(module):
                    enter, leave = self._hooks(name)
                    before = module.register_forward_pre_hook(enter, with_kwargs=True)
                    after = module.register_forward_hook(leave, with_kwargs=True)
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            yield

    def _hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
            self._inside += 1

        def leave(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._inside -= 1
            if not self._inside:
                self._put("call_module", name, args, kwargs, output)

        return enter, leave
