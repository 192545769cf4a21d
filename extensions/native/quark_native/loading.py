"""Loading what :mod:`quark_native.storage` wrote into a copy of the float model."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from quark_core.errors import QuantizationError
from quark_core.plan import Plan
from quark_native.flows import eager
from quark_native.nn import OPS
from quark_native.quantizers import PackedParameter, Parameterized
from quark_native.storage import DESCRIPTION, SCHEMA, TENSORS

_Shared = dict[int, tuple[PackedParameter, nn.Parameter]]


def read(directory: Path) -> tuple[Plan, dict[str, Tensor]]:
    """Read a saved model: its plan, and its tensors under all their names.

    Raises:
        QuantizationError: A file is missing, damaged or of another version.
    """
    fix = "Save the model again"
    try:
        description = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
        tensors = load_file(directory / TENSORS)
    except FileNotFoundError:
        missing = DESCRIPTION if not (directory / DESCRIPTION).exists() else TENSORS
        raise QuantizationError(
            f"the saved model has no {missing}", where=str(directory), fix=fix
        ) from None
    except (ValueError, SafetensorError) as error:
        raise QuantizationError(
            "the saved model is damaged", where=str(directory), cause=str(error), fix=fix
        ) from None
    if description.get("schema") != SCHEMA:
        raise QuantizationError(
            f"the saved model has schema {description.get('schema')!r}, and this version of "
            f"quark-native reads {SCHEMA}",
            where=str(directory),
            fix=fix,
        )
    tensors.update({name: tensors[first] for name, first in description["aliases"].items()})
    return Plan.from_dict(description["plan"]), tensors


def check_layers(model: nn.Module, plan: Plan) -> None:
    """Refuse a float model that the saved one was not made from.

    Raises:
        QuantizationError: Names the first layer that is missing or has another shape.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    fix = "Load into the model that was quantized"
    for entry in plan.quantized:
        layer = modules.get(entry.name)
        if layer is None or not any(base in OPS for base in type(layer).__mro__):
            found = "is missing" if layer is None else f"is a {type(layer).__name__}"
            raise QuantizationError(
                f"the saved {entry.type} {found} in the float model",
                where=f"layer {entry.name!r}",
                fix=fix,
            )
        shape = tuple(layer.get_parameter("weight").shape)
        if shape != entry.shape:
            raise QuantizationError(
                f"the saved weight is {list(entry.shape or ())}, the float model's {list(shape)}",
                where=f"layer {entry.name!r}",
                fix=fix,
            )


def restore(model: nn.Module, plan: Plan, tensors: dict[str, Tensor], *, keep_float: bool) -> None:
    """Give a model made ready by :func:`eager.attach` the saved tensors.

    Raises:
        QuantizationError: Tensors are missing, left over or of another shape.
    """
    shared: _Shared = {}
    rest = dict(tensors)
    for name, layer in eager.layers(model, plan).items():
        prefix = f"{name}." if name else ""
        for role in ("input", "output"):
            quantizer = getattr(layer, f"{role}_quantizer")
            if quantizer is None:
                continue
            stored = _take(rest, f"{prefix}{role}_quantizer.")
            if quantizer.observer is not None and "scale" not in stored:
                raise _unfitting(f"no scale for {prefix}{role}")
            quantizer.restore(stored)
        for role, fmt in eager.constants(plan[name]):
            values = layer.get_parameter(role)
            stored = _take(rest, f"{prefix}packed.{role}.")
            if "codes" not in stored:
                raise _unfitting(f"no codes for {prefix}{role}")
            identity = id(stored["codes"])  # one tensor for all names of a shared one
            if identity not in shared:
                packed = PackedParameter(fmt, tuple(values.shape))
                try:
                    packed.restore({key: part.to(values.device) for key, part in stored.items()})
                except KeyError as error:
                    raise _unfitting(f"no {error.args[0]} for {prefix}{role}") from None
                shared[identity] = eager.share(packed, values)
            layer.pack(role, *shared[identity], keep=keep_float)
    try:
        missing, unexpected = model.load_state_dict(rest, strict=False)
    except RuntimeError as error:
        raise _unfitting(str(error).replace("\n\t", " ")) from None
    modules = model.named_modules(remove_duplicate=False)
    own = {name for name, module in modules if isinstance(module, Parameterized)}
    missing = [name for name in missing if name.rpartition(".")[0] not in own]
    if missing or unexpected:
        wrong = ", ".join([*(f"no {name}" for name in missing), *unexpected])
        raise _unfitting(wrong)


def _take(rest: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the tensors below ``prefix`` from ``rest`` and return them by their own name."""
    names = [name for name in rest if name.startswith(prefix)]
    return {name.removeprefix(prefix): rest.pop(name) for name in names}


def _unfitting(cause: str) -> QuantizationError:
    return QuantizationError(
        "the saved tensors do not fit the float model",
        cause=cause,
        fix="Load into the model that was quantized",
    )
