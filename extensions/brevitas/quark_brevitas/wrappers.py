"""What stands around a layer: a factor or a rotation before it, a float branch beside it."""

from __future__ import annotations

import importlib
from functools import cache
from math import prod
from typing import Any

import torch
from torch import nn

from quark_brevitas.low_rank import LowRankBranch
from quark_core.plan import Plan

WRAPPED = "layer"
"""What Brevitas calls a layer within the module that multiplies its input first."""
_READ = frozenset(
    ("weight", "bias", "in_features", "out_features", "in_channels", "out_channels")
) | frozenset(("kernel_size", "stride", "padding", "dilation", "groups"))
"""What models read of their layers besides calling them."""


def kinds() -> tuple[Any, Any]:
    """Brevitas's modules that multiply, or rotate, what a layer receives."""
    # Imported first of all of Brevitas, the module of these two would import itself in turn.
    importlib.import_module("brevitas.graph")
    from brevitas.nn.equalized_layer import EqualizedModule, RotatedModule

    return EqualizedModule, RotatedModule


def show_layers(model: nn.Module) -> None:
    """Let wrappers answer for the layers within, where a model reads a weight's dtype, say.

    Wrappers also take the place of those layers under their other names.
    """
    _share(model)
    from brevitas.utils.torch_utils import KwargsForwardHook

    answering = (*kinds(), KwargsForwardHook, LowRankBranch)
    for module in model.modules():
        if type(module) in answering:
            module.__class__ = _showing(type(module))  # type: ignore[arg-type]


def _share(model: nn.Module) -> None:
    wrapping = (*kinds(), LowRankBranch)
    parents = [module for module in model.modules() if not isinstance(module, wrapping)]
    children = [child for parent in parents for child in parent.children()]
    outer = {id(inner(child)): child for child in children if isinstance(child, wrapping)}
    for parent in parents:
        for name, child in parent._modules.items():
            if id(child) in outer:
                parent._modules[name] = outer[id(child)]


@cache
def _showing(kind: type[nn.Module]) -> type[nn.Module]:
    def look(self: nn.Module, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name not in _READ:
                raise
        within = self._modules.get(WRAPPED) or self._modules["module"]
        return getattr(within, name)

    return type(kind.__name__, (kind,), {"__getattr__": look, "__module__": kind.__module__})


def inner(module: nn.Module) -> nn.Module:
    """The layer itself, where a factor or a rotation was put before it, or a branch beside it."""
    factor, rotation = kinds()
    while isinstance(module, factor | rotation | LowRankBranch):
        module = module.layer
    return module


def path_of(model: nn.Module, name: str) -> str:
    """The dotted path of the layer the plan knows by a name, behind what was put before it."""
    module, layer = model.get_submodule(name), inner(model.get_submodule(name))
    while module is not layer:
        name, module = f"{name}.{WRAPPED}", module.get_submodule(WRAPPED)
    return name


def factor_shapes(model: nn.Module, plan: Plan) -> dict[str, list[int]]:
    """The shapes in which factors of activation equalization meet inputs, by layer."""
    factor, _ = kinds()
    found = {}
    for entry in plan.quantized:
        module, layer = model.get_submodule(entry.name), inner(model.get_submodule(entry.name))
        while module is not layer:
            if isinstance(module, factor):
                found[entry.name] = list(module.scale.runtime_shape)
            module = module.get_submodule(WRAPPED)
    return found


def put_factor(model: nn.Module, name: str, values: torch.Tensor) -> None:
    """Multiply what a layer receives, in place."""
    put_factors(model, {name: list(values.shape)})
    factor: Any = model.get_submodule(path_of(model, name).removesuffix(f".{WRAPPED}"))
    factor.scale.weight.data.copy_(values)


def put_factors(model: nn.Module, shapes: dict[str, list[int]]) -> None:
    """Put a factor, one for now, before each of these layers."""
    from brevitas.nn.quant_scale_bias import ScaleBias

    wrapper, _ = kinds()
    for name, shape in shapes.items():
        path = path_of(model, name)
        layer = model.get_submodule(path)
        factor = ScaleBias(prod(shape), bias=False, runtime_shape=tuple(shape))
        model.set_submodule(path, wrapper(factor.to(layer.get_parameter("weight")), layer))
    show_layers(model)
