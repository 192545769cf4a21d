"""Keys and values that models of transformers keep from the calls before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def switch_off(model: nn.Module) -> list[Any]:
    """Let a model keep none, in place; returns the configurations that asked for them."""
    found = {id(config): config for module in model.modules() if (config := _asking(module))}
    for config in found.values():
        config.use_cache = False
    return list(found.values())


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """For a while, a model keeps none."""
    configs = switch_off(model)
    try:
        yield
    finally:
        for config in configs:
            config.use_cache = True


def _asking(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if getattr(config, "use_cache", False) is True else None
