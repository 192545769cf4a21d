"""Saving: packed tensors in safetensors, everything else in JSON; never pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from quark_core.errors import ExportError
from quark_core.plan import Plan
from quark_native import __version__
from quark_native.quantizers import Parameterized

TENSORS, DESCRIPTION = "model.safetensors", "quantized.json"
SCHEMA = 1


def stored_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a quantized model as it is stored, and other names of the same ones.

    Scales that are powers of two are stored as one byte, zero points packed in their format's
    bits; all others as in the model's state dict.

    Returns:
        Tensors by the name of the state dict, and for each further name of a shared tensor the
        name under which it is.

    Raises:
        ExportError: A module has extra state that is no tensor.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}

    def add(name: str, tensor: Tensor, identity: object, *, shared: bool) -> None:
        if shared and identity in first:
            aliases[name] = first[identity]
            return
        first[identity] = name
        tensors[name] = tensor.detach().contiguous()

    own: set[str] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Parameterized):
            own.add(prefix)
            for name, tensor in module.stored().items():
                add(f"{prefix}.{name}", tensor, (id(module), name), shared=True)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ExportError(
                "the module keeps extra state that is no tensor",
                where=f"state {name!r}",
                fix="Such a model cannot be saved without pickle; drop get_extra_state",
            )
        if name.rpartition(".")[0] not in own:
            identity = (tensor.data_ptr(), tensor.shape, tensor.stride())
            add(name, tensor, identity, shared=tensor.numel() > 0)
    return tensors, aliases


def write(directory: Path, model: nn.Module, plan: Plan, options: dict[str, Any]) -> None:
    """Write a quantized model.

    Args:
        directory: Made if it does not exist.
        model: The quantized module.
        plan: The plan it carries out.
        options: The configuration as plain data, for the reader of the file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors, aliases = stored_tensors(model)
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, directory / TENSORS)
    description = {
        "schema": SCHEMA,
        "version": __version__,
        "config": options,
        "plan": plan.to_dict(),
        "aliases": aliases,
    }
    text = json.dumps(description, indent=2, sort_keys=True)
    (directory / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
