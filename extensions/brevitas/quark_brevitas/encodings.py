"""Reading scales and zero points out of Brevitas's quantizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quark_brevitas import attention
from quark_brevitas.formats import is_static, largest
from quark_brevitas.graphs import is_traced
from quark_brevitas.wrappers import inner
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


class Reader:
    """Reads the encodings of a model's layers.

    Brevitas counts asymmetric codes from zero; where the plan says a signed format they are
    reported shifted by half the range, which is the same grid. The scale of an MX integer is
    reported as OCP MX has it, the power of two its block shares: Brevitas's divides by the
    elements' fraction too.

    Args:
        model: The whole model; with fx, inputs are quantized outside the layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        graph: Any = model.graph if is_traced(model) else None
        self._calls: dict[Any, Any] = {}
        for node in graph.nodes if graph is not None else ():
            if node.op == "call_module":
                self._calls.setdefault(node.target, node)

    def read(self, entry: PlanEntry) -> list[Encoding]:
        """The encodings of one quantized layer."""
        layer: Any = inner(self._modules[entry.name])
        if entry.op == attention.OP:
            return _attention(layer, entry)
        specs = entry.specs
        found = {}
        # One pass through a quantizer tells all; asking for each number would take one each.
        if "weight" in specs or "bias" in specs:
            found["weight"] = layer.quant_weight()
        if "bias" in specs or ("input" in specs and is_static(specs["input"])):
            found["input"] = self._input(entry.name, layer)
        return [_encoding(layer, entry, role, spec, found) for role, spec in specs.items()]

    def _input(self, name: str, layer: Any) -> Any:
        """What the quantizer of a layer's input makes of a zero."""
        own = getattr(layer, "input_quant", None)
        if own is None or not own.is_quant_enabled:
            own = self._before(name)
        return own(torch.zeros(1, device=layer.weight.device))

    def _before(self, layer: str) -> Any:
        """The activation quantizer whose output reaches a layer of a traced graph.

        Raises:
            QuantizationError: There is none before it.
        """
        node = self._calls.get(layer)
        while node is not None and node.all_input_nodes:
            node = node.all_input_nodes[0]
            quantizer = getattr(self._modules.get(node.target), "act_quant", None)
            if node.op == "call_module" and quantizer is not None:
                return quantizer
        raise QuantizationError("no quantizer stands before the layer", where=f"layer {layer!r}")


def _encoding(
    layer: Any, entry: PlanEntry, role: Role, spec: TensorSpec, found: Mapping[str, Any]
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
        scale = (found["input"].scale * found["weight"].scale).reshape(-1)
        return _static(common, _Numbers(scale, torch.zeros_like(scale), signed=True), spec)
    numbers = _compact(found[role], spec, common["axis"])
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
        if name == "softmax" and spec.symmetric and spec.number_format.family == "integer":
            common["format"] = f"u{spec.format}"
            spec = replace_format(spec, common["format"])
        if not is_static(spec):
            found.append(Encoding(**common, dynamic=True))
            continue
        numbers = _compact(quantizer(torch.zeros(1)), spec, None)
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
