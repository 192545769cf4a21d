"""From a module tree to what rules select: names, classes, operations, and the model's ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from quark_core.batch import Batch, leaves
from quark_core.selection import Target

if TYPE_CHECKING:
    import torch
    from torch import nn

_Source = tuple[int, int]
_Scope = tuple[str, tuple[str, ...]]


def type_names(cls: type) -> tuple[str, ...]:
    """Every name a rule may use for a class: its own and those it derives from.

    Each class is listed bare (``Linear``), by the module that defines it
    (``torch.nn.modules.linear.Linear``) and by each package around that module which offers the
    class under its name (``torch.nn.Linear``).
    """
    names: list[str] = []
    for base in cls.__mro__[:-1]:
        names += [base.__name__, f"{base.__module__}.{base.__qualname__}"]
        package = base.__module__
        while "." in package:
            package = package.rpartition(".")[0]
            # Not getattr: a package may load its parts lazily, and asking must not import.
            if getattr(sys.modules.get(package), "__dict__", {}).get(base.__name__) is base:
                names.append(f"{package}.{base.__name__}")
    return tuple(dict.fromkeys(names))


def module_targets(model: nn.Module, ops: Mapping[type, str]) -> list[tuple[Target, nn.Module]]:
    """The layers of a model that a backend knows, in the order the model defines them.

    A layer registered under several names is listed once, under the first.

    Args:
        model: Any module; a model that is itself such a layer has the name ``""``.
        ops: Operation by class. A class also stands for its subclasses; the nearest wins.
    """
    found = []
    for name, module in model.named_modules():
        op = next((ops[base] for base in type(module).__mro__ if base in ops), None)
        if op is not None:
            scopes = _scopes(model, name)
            found.append((Target(name, type_names(type(module)), op, (), scopes), module))
    return found


def io_roles(
    model: nn.Module, names: Collection[str], example: Batch
) -> dict[str, tuple[str, ...]]:
    """Which layers read the model's input or make its output, found by running it once.

    A layer reads the input if it is called with one of the model's own input tensors, and makes
    the output if a tensor it returns is returned by the model. A view (reshape, transpose,
    slice) of a tensor counts as that tensor; what another operation computed from it, in place
    or not, does not.

    Args:
        model: The model, in the mode to be traced (normally eval, without gradients).
        names: The layers asked about.
        example: A batch; its first sample is run.

    Returns:
        For each name ``()``, ``("input",)``, ``("output",)`` or both.
    """
    batch = example.beside(model).first()
    inputs = {_source(leaf) for leaf in leaves((batch.args, batch.kwargs))}
    readers: set[str] = set()
    made: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    sources: dict[str, set[_Source]] = {name: set() for name in names}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            if any(_source(leaf) in inputs for leaf in leaves((args, kwargs))):
                readers.add(name)
            tensors = list(leaves(output))
            made[name] += tensors  # kept alive: a freed tensor's memory could be used again
            sources[name].update(_source(tensor) for tensor in tensors)

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True)
        for name in names
    ]
    try:
        outputs = {_source(leaf) for leaf in leaves(batch.run(model))}
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: (("input",) if name in readers else ())
        + (("output",) if sources[name] & outputs else ())
        for name in names
    }


def _scopes(model: nn.Module, name: str) -> tuple[_Scope, ...]:
    """The modules around a layer, outermost first, the model itself under the name ``""``."""
    if not name:
        return ()
    parts = name.split(".")
    around = [".".join(parts[:count]) for count in range(len(parts))]
    return tuple((scope, type_names(type(model.get_submodule(scope)))) for scope in around)


def _source(tensor: torch.Tensor) -> _Source:
    """What a tensor and its views share, and how often it was written: equal means same values."""
    return tensor.untyped_storage()._cdata, tensor._version
