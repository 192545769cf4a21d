"""Taking modules apart into layers that quantizers, rules and algorithms can reach."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

Make = Callable[[str, nn.Module], nn.Module | None]
"""From a module's name and the module to what stands for it, or None where it stays."""


def take_apart(model: nn.Module, make: Make) -> list[str]:
    """Put what computes the same in the place of modules, in place and under all their names.

    Args:
        model: Holds the modules; is none of them itself.
        make: Makes the parts of each.

    Returns:
        The names of the Linear layers that came of it.
    """
    parts: dict[int, nn.Module | None] = {}
    found = []
    # The list keeps modules alive, so that no other gets the id of one that has been replaced.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not name:
            continue
        if id(module) not in parts:
            made = parts[id(module)] = make(name, module)
            layers = made.named_modules() if made is not None else ()
            found += [f"{name}.{path}" for path, layer in layers if isinstance(layer, nn.Linear)]
        part = parts[id(module)]
        if part is not None:
            model.set_submodule(name, part)
    return found
