"""Reading scales and zero points out of Brevitas's quantizers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quark_brevitas import attention
from quark_brevitas.formats import is_static, largest
from quark_brevitas.preparation import inner
from quark_core.errors import QuantizationError
from quark_core.plan import PlanEntry
from quark_core.quantized import Encoding
from quark_core.spec import Role, TensorSpec


@dataclass(frozen=True)
class _Numbers:
    """What one quantizer holds, compact: one value a scale."""

    scale: Tensor
    zero_point: Tensor
    signed: bool
    narrow: bool = False


def read(model: nn.Module, layer: nn.Module, entry: PlanEntry) -> list[Encoding]:
    """The encodings of one quantized layer.

    Brevitas counts asymmetric codes from zero; where the plan says a signed format they are
    reported shifted by half the range, which is the same grid. The scale of an MX integer is
    reported as OCP MX has it, the power of two its block shares: Brevitas's divides by the
    elements' fraction too.

    Args:
        model: The whole model; with fx, inputs are quantized outside the layer.
        layer: Brevitas's layer.
        entry: Its entry in the plan.
    """
    if entry.op == attention.OP:
        return _attention(layer, entry)
    return [_encoding(model, layer, entry, role, spec) for role, spec in entry.specs.items()]


def _encoding(
    model: nn.Module, layer: Any, entry: PlanEntry, role: Role, spec: TensorSpec
) -> Encoding:
    common: dict[str, Any] = {
        "tensor": f"{entry.name}.{role}",
        "layer": entry.name,
        "role": role,
        "format": spec.format,
        "granularity": str(spec.granularity),
        "axis": _axis(entry, role, spec),
        "symmetric": spec.symmetric is not False,
        "scale_format": spec.scale or "float32",
    }
    if role == "input" and not is_static(spec):
        return Encoding(**common, dynamic=True)
    if role == "bias":
        weight, inputs = layer.quant_weight().scale, _upstream(model, entry).scale
        scale = (inputs * weight).reshape(-1)
        return _static(common, _Numbers(scale, torch.zeros_like(scale), signed=True), spec)
    # One pass through the quantizer tells all; asking for each number would take one each.
    found = layer.quant_weight() if role == "weight" else _upstream(model, entry)
    numbers = _compact(found, spec, common["axis"])
    narrow = role == "weight" and bool(layer.weight_quant.is_narrow_range)
    return _static(common, replace(numbers, narrow=narrow), spec)


def _attention(layer: nn.Module, entry: PlanEntry) -> list[Encoding]:
    """One encoding a tensor within attention; the first stands for the layer's input."""
    spec = entry.input
    assert spec is not None
    found = []
    for at, (name, quantizer) in enumerate(attention.quantizers(layer)):
        common: dict[str, Any] = {
            "tensor": f"{entry.name}.{name if at else 'input'}",
            "layer": entry.name,
            "role": "input",
            "format": spec.format,
            "granularity": str(spec.granularity),
            "symmetric": spec.symmetric is not False,
            "scale_format": spec.scale or "float32",
        }
        if not is_static(spec):
            found.append(Encoding(**common, dynamic=True))
            continue
        numbers = _compact(quantizer(torch.zeros(1)), spec, None)
        if name == "softmax" and spec.symmetric and spec.number_format.family == "integer":
            common["format"] = f"u{spec.format}"
            spec = replace_format(spec, common["format"])
        found.append(_static(common, numbers, spec))
    return found


def replace_format(spec: TensorSpec, fmt: str) -> TensorSpec:
    """The same spec with another number format."""
    return spec.model_copy(update={"format": fmt})


def _axis(entry: PlanEntry, role: Role, spec: TensorSpec) -> int | None:
    """The axis of the channels or groups, as Brevitas chooses it."""
    assert spec.granularity is not None
    transposed = entry.op.startswith("conv_transpose")
    if spec.granularity.kind == "group":
        if role == "input":
            return -1 if entry.op == "linear" else 1
        return 0 if transposed else 1
    if spec.granularity.kind == "channel":
        return 1 if transposed and role == "weight" else 0
    return None


def _compact(found: Any, spec: TensorSpec, axis: int | None) -> _Numbers:
    """One value a scale, without the axes Brevitas keeps for broadcasting."""
    assert spec.granularity is not None
    signed = bool(found.signed)
    if spec.granularity.kind == "group":
        assert axis is not None
        scale = found.scale_.squeeze(axis + 1)
        zero_point = found.zero_point_
        zero_point = zero_point.squeeze(axis + 1) if zero_point.ndim > scale.ndim else zero_point
        return _Numbers(scale, zero_point, signed)
    shape = (-1,) if spec.granularity.kind == "channel" else ()
    zero_point = found.zero_point.reshape(-1) if shape else found.zero_point.reshape(())
    return _Numbers(found.scale.reshape(shape), zero_point, signed)


def _static(common: dict[str, Any], numbers: _Numbers, spec: TensorSpec) -> Encoding:
    fmt = spec.number_format
    scale = numbers.scale.detach().float()
    if fmt.exponent is not None:
        high = scale * largest(fmt)
        return Encoding(**common, scale=scale, min=-high, max=high)
    if fmt.family == "mx":
        scale = scale * 2 ** (fmt.bits - 2)
        high = scale * (2 - 2.0 ** (2 - fmt.bits))
        return Encoding(**common, scale=scale, min=-high, max=high)
    half = 2 ** (fmt.bits - 1)
    zeros = numbers.zero_point.detach().expand(scale.shape).clone()
    if bool((zeros == zeros.round()).all()):
        zeros = zeros.to(torch.int32)
    if fmt.signed and not numbers.signed:
        zeros -= half
    low = -half if fmt.signed else 0
    high = low + 2 * half - 1
    common["symmetric"] = common["symmetric"] and bool((zeros == 0).all())
    return Encoding(
        **common,
        scale=scale,
        zero_point=zeros,
        min=(low + numbers.narrow - zeros) * scale,
        max=(high - zeros) * scale,
    )


def _upstream(model: nn.Module, entry: PlanEntry) -> Any:
    """What the quantizer of a layer's input makes of a zero; it tells scale and zero point."""
    layer = inner(model.get_submodule(entry.name))
    own: Any = getattr(layer, "input_quant", None)
    if own is None or not own.is_quant_enabled:
        own = _before(model, entry.name)
    return own(torch.zeros(1, device=layer.get_parameter("weight").device))


def _before(model: nn.Module, layer: str) -> Any:
    """The activation quantizer whose output reaches a layer of a traced graph.

    Raises:
        QuantizationError: There is none before it.
    """
    modules = dict(model.named_modules())
    graph: Any = model.graph
    node = next(node for node in graph.nodes if node.op == "call_module" and node.target == layer)
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        quantizer = getattr(modules.get(node.target), "act_quant", None)
        if node.op == "call_module" and quantizer is not None:
            return quantizer
    raise QuantizationError("no quantizer stands before the layer", where=f"layer {layer!r}")
