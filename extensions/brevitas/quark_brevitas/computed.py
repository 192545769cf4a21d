"""Weights that a model computes from others before each use, or does not have yet."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from quark_core.errors import QuantizationError
from quark_core.selection import Target


def has_parametrizations(model: nn.Module) -> bool:
    """Whether any tensor is made by torch's parametrizations, as those of weight_norm are."""
    return any(map(is_parametrized, model.modules()))


def settle(model: nn.Module) -> None:
    """Make parameters of what parametrizations compute, in place: Brevitas rounds parameters.

    torch's own ``remove_parametrizations`` changes a class that copies of a model share.
    """
    for module in list(model.modules()):
        if not is_parametrized(module):
            continue
        tensors = {
            name: (getattr(module, name).detach().clone(), list(parts.parameters(recurse=False)))
            for name, parts in cast("nn.ModuleDict", module.parametrizations).items()
        }
        module.__class__ = type_before_parametrizations(module)
        del module.parametrizations
        for name, (tensor, origins) in tensors.items():
            if origins:
                trained = any(origin.requires_grad for origin in origins)
                module.register_parameter(name, nn.Parameter(tensor, trained))
            else:
                module.register_buffer(name, tensor)


def require_weights(layers: Iterable[tuple[Target, nn.Module]], kinds: Collection[type]) -> None:
    """Refuse layers without a weight of their own that :func:`settle` cannot give one.

    Args:
        layers: Layers of these kinds, and of classes derived from them.
        kinds: The classes that will be replaced.

    Raises:
        QuantizationError: Names the layer and what to do about its weight.
    """
    for target, layer in layers:
        if is_parametrized(layer, "weight"):
            continue
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and is_lazy(weight):
            raise QuantizationError(
                "the layer has no weight yet",
                where=f"layer {target.name!r}",
                fix="Run the model on one batch first, so that lazy layers take their shapes",
            )
        if type(layer) in kinds and "weight" not in layer._parameters:
            raise QuantizationError(
                "a hook computes the layer's weight anew in each call",
                where=f"layer {target.name!r}",
                fix="Make it permanent first: torch.nn.utils.remove_weight_norm, "
                "remove_spectral_norm, or prune.remove",
            )
