"""The eager flow: layers become quantized where they stand, by changing their class.

Changing the class instead of putting a new module in its place keeps everything that refers to
the layer: its names (all of them, if it has several), hooks, lists that a model holds outside its
module tree. Values of layers that share a weight are quantized once and stay shared, if their
specs agree; otherwise each gets codes of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quark_core.errors import QuantizationError
from quark_core.plan import Plan, PlanEntry
from quark_core.spec import Role, TensorSpec
from quark_native.encodings import observer_for
from quark_native.formats import Format, Parameters
from quark_native.nn import QuantizedLayer, layer_format, quantized_class
from quark_native.quantizers import PackedParameter, TensorQuantizer

_CONSTANTS: tuple[Role, ...] = ("weight", "bias")


def attach(model: nn.Module, plan: Plan) -> nn.Module:
    """Make the plan's layers quantized ones that still compute in float.

    Static quantizers observe from here on, until :func:`freeze`.

    Args:
        model: The float model; changed.
        plan: What :func:`quark_native.planning.make_plan` made of it.
    """
    for entry in plan.quantized:
        layer = model.get_submodule(entry.name)
        layer.__class__ = quantized_class(type(layer))
        assert isinstance(layer, QuantizedLayer)
        quantizers = {role: _quantizer(entry, role) for role in ("input", "output")}
        layer.setup(entry.specs, quantizers["input"], quantizers["output"])
    return model


def layers(model: nn.Module, plan: Plan) -> Mapping[str, QuantizedLayer]:
    """The quantized layers by name, in the order of the plan."""
    found = {}
    for entry in plan.quantized:
        layer = model.get_submodule(entry.name)
        assert isinstance(layer, QuantizedLayer)
        found[entry.name] = layer
    return found


def activation_quantizers(layer: QuantizedLayer) -> list[TensorQuantizer]:
    """The layer's quantizers of input and output."""
    both = (layer.input_quantizer, layer.output_quantizer)
    return [quantizer for quantizer in both if quantizer is not None]


def freeze(model: nn.Module, plan: Plan, *, keep_float: bool) -> None:
    """Fix ranges, encode weights and biases; the model computes quantized afterwards.

    Raises:
        QuantizationError: A range was never observed, or a tensor is not finite.
    """
    found = layers(model, plan)
    tied = _tied_parameters(found, plan)
    shared: dict[object, tuple[PackedParameter, nn.Parameter]] = {}
    for name, layer in found.items():
        for quantizer in activation_quantizers(layer):
            quantizer.freeze()
        for role, fmt in constants(plan[name]):
            values, spec = layer.get_parameter(role), plan[name].specs[role]
            key = (id(values), str(spec), fmt.layout)
            pair = shared.get(key) or _pack(values, spec, fmt, f"{name}.{role}")
            if id(values) in tied:
                shared[key] = pair
            layer.pack(role, *pair, keep=keep_float)


def _tied_parameters(found: Mapping[str, QuantizedLayer], plan: Plan) -> dict[int, nn.Parameter]:
    """Parameters that several quantized layers have, by id; held here, so that ids stay theirs."""
    seen: dict[int, nn.Parameter] = {}
    tied = {}
    for name, layer in found.items():
        for role, _ in constants(plan[name]):
            values = layer.get_parameter(role)
            if id(values) in seen:
                tied[id(values)] = values
            seen[id(values)] = values
    return tied


def constants(entry: PlanEntry) -> list[tuple[Role, Format]]:
    """The constants of a layer that are quantized, with their formats."""
    return [
        (role, layer_format(entry.op, role, entry.specs[role]))
        for role in _CONSTANTS
        if role in entry.specs
    ]


def share(packed: PackedParameter, values: Tensor) -> tuple[PackedParameter, nn.Parameter]:
    """Codes, and a parameter with their values in the dtype and on the device of ``values``."""
    decoded = packed.decode(values.dtype).to(values.device)
    return packed, nn.Parameter(decoded, requires_grad=False)


def _quantizer(entry: PlanEntry, role: Role) -> TensorQuantizer | None:
    spec = entry.specs.get(role)
    if spec is None:
        return None
    return TensorQuantizer(spec, layer_format(entry.op, role, spec), f"{entry.name}.{role}")


def _pack(
    values: Tensor, spec: TensorSpec, fmt: Format, where: str
) -> tuple[PackedParameter, nn.Parameter]:
    if not bool(torch.isfinite(values).all()):
        raise QuantizationError(
            "the float values hold NaN or infinities",
            where=f"tensor {where!r}",
            fix="Check the checkpoint, or skip the layer by a rule",
        )
    encoded = fmt.encode(values.detach(), _parameters(values.detach(), spec, fmt))
    return share(PackedParameter.of(encoded, fmt), values)


def _parameters(values: Tensor, spec: TensorSpec, fmt: Format) -> Parameters | None:
    if not fmt.covers:
        return None
    observer = observer_for(spec.observer, fmt, stream=False)
    observer.observe(values)
    return observer.scale_zero_point()
