"""Reading weights without running anything that a file contains."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch

from quark_core.errors import DataError, UntrustedContentError

_LISTED = 5
_CONVERT = (
    "If you trust the file, convert it once where it came from: "
    "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
)


def read_state(file: Path, where: str = "model.checkpoint") -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or of a .pt that holds nothing but tensors.

    Raises:
        UntrustedContentError: The file is a pickle that would execute code.
        DataError: The file is damaged or holds no tensors by name.
    """
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"{file} is no safetensors file", where=where, cause=str(error)
            ) from error
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        cause = str(error).splitlines()[0].removeprefix("Weights only load failed. ")
        raise UntrustedContentError(
            f"{file} is a pickle that asks for code to be run, which is refused",
            where=where,
            cause=_global_asked_for(str(error)) or cause[:120],
            fix=_CONVERT,
        ) from error
    except Exception as error:
        raise DataError(
            f"{file} cannot be read as a checkpoint",
            where=where,
            cause=f"{type(error).__name__}: {str(error).splitlines()[0][:120]}",
            fix="Use safetensors, or torch.save(model.state_dict(), path)",
        ) from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in found.values()
    ):
        raise DataError(
            f"{file} holds {type(found).__name__}, not tensors by name", where=where, fix=_CONVERT
        )
    return dict(found)


def load_into(model: torch.nn.Module, file: Path, where: str = "model.checkpoint") -> None:
    """Load a checkpoint into a model; every tensor must be there and fit.

    Raises:
        UntrustedContentError, DataError: As :func:`read_state`, or names and shapes differ.
    """
    state, own = read_state(file, where), model.state_dict()
    problems = [
        *_some("missing", [name for name in own if name not in state]),
        *_some("unexpected", [name for name in state if name not in own]),
        *_some(
            "of another shape",
            [
                f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
                for name in own
                if name in state and state[name].shape != own[name].shape
            ],
        ),
    ]
    if problems:
        raise DataError(
            f"{file.name} does not fit the model: {'; '.join(problems)}",
            where=where,
            fix="Check that the factory builds the model the checkpoint was saved from",
        )
    model.load_state_dict(state)


def _some(word: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return [f"{word}: {', '.join(names[:_LISTED])}{more}"]


def _global_asked_for(message: str) -> str | None:
    """The function a pickle wants to call, as torch names it."""
    _, found, rest = message.partition("GLOBAL ")
    return f"it names {rest.split()[0]}" if found else None
