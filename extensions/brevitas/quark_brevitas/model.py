"""BrevitasModel: a model of Brevitas's layers, and its numbers in the host's terms."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quark_core.batch import Batch
from quark_core.errors import QuantizationError
from quark_core.plan import Plan, PlanEntry
from quark_core.quantized import Encoding, QuantizedModel, packed_sizes
from quark_core.spec import Role, TensorSpec

_STATE, _ABOUT = "brevitas.safetensors", "brevitas.json"
_PROXIES = ("weight_quant", "input_quant", "bias_quant")


@dataclass
class Prepared:
    """A rewritten model on its way through calibration.

    Attributes:
        module: The model with Brevitas's layers.
        plan: The plan it follows.
        example: One batch, or None.
        counterparts: By layer, the float module that computes the same, where it is not the
            layer itself.
    """

    module: nn.Module
    plan: Plan
    example: Batch | None = None
    counterparts: dict[str, str | None] = field(default_factory=dict)


class BrevitasModel(QuantizedModel):
    """A model quantized by Brevitas.

    Layers keep the float model's names. Weights stay float and are quantized anew in each
    forward, as Brevitas does.
    """

    def __init__(self, prepared: Prepared) -> None:
        super().__init__(prepared.module, prepared.plan)
        self._counterparts = prepared.counterparts

    def counterpart(self, name: str) -> str | None:
        """A folded BatchNorm where there is one; None after equalization."""
        return self._counterparts.get(name, name)

    def encodings(self) -> list[Encoding]:
        """Scale and zero point of each quantized tensor, read from Brevitas's quantizers.

        Brevitas counts asymmetric codes from zero; where the plan says a signed format they are
        reported shifted by half the range, which is the same grid.
        """
        found = []
        with torch.no_grad():
            for entry in self.plan.quantized:
                layer = self.module.get_submodule(entry.name)
                for role, spec in entry.specs.items():
                    found.append(self._encoding(entry, layer, role, spec))
        return found

    def storage(self) -> dict[str, int]:
        """Packed bytes of the tensors left after folding BatchNorm."""
        tensors = {
            name: (tuple(tensor.shape), tensor.element_size())
            for name, tensor in self.module.state_dict().items()
            if not any(part.endswith("_quant") for part in name.split("."))
        }
        return packed_sizes(tensors, self.encodings())

    def save(self, directory: Path) -> None:
        """Write the state as safetensors, and what it was made with as JSON."""
        from safetensors.torch import save_file

        state = {
            name: tensor.detach().clone().contiguous()
            for name, tensor in self.module.state_dict().items()
        }
        save_file(state, directory / _STATE)
        about = {
            "format": 1,
            "brevitas": version("brevitas"),
            "torch": torch.__version__,
            "plan": self.plan.to_dict()["layers"],
        }
        (directory / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load_state(prepared: Prepared, directory: Path) -> BrevitasModel:
        """Load what :meth:`save` wrote into a model prepared in the same way.

        Raises:
            QuantizationError: The files are missing, or do not fit the prepared model.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            about = json.loads((directory / _ABOUT).read_text(encoding="utf-8"))
            if about["plan"] != prepared.plan.to_dict()["layers"]:
                # Brevitas itself would load what is there and leave the rest uncalibrated.
                raise ValueError("it was saved under another plan")
            state = load_file(directory / _STATE)
            # Bias correction gives a bias to layers that had none.
            for name, tensor in state.items():
                owner, _, last = name.rpartition(".")
                if last == "bias" and prepared.module.get_submodule(owner).bias is None:
                    prepared.module.get_submodule(owner).bias = nn.Parameter(tensor.clone())
            prepared.module.load_state_dict(state)
        except (OSError, SafetensorError, RuntimeError, AttributeError, ValueError) as error:
            raise QuantizationError(
                "the saved state does not fit the prepared model",
                where=str(directory),
                cause=str(error).strip().splitlines()[-1].strip(),
                fix="Load with the configuration and float model it was saved with",
            ) from error
        return BrevitasModel(prepared)

    def set_enabled(self, layer: str, enabled: bool) -> None:
        """Switch one layer's own quantizers; with fx its inputs stay quantized along the graph.

        Raises:
            QuantizationError: The plan quantizes no such layer.
        """
        if layer not in self.plan or not self.plan[layer].quantized:
            names = ", ".join(entry.name for entry in self.plan.quantized[:5])
            raise QuantizationError(
                f"no quantized layer {layer!r}", where="set_enabled", fix=f"There are {names}..."
            )
        module = self.module.get_submodule(layer)
        for name in _PROXIES:
            proxy = getattr(module, name, None)
            if proxy is not None:
                proxy.disable_quant = not enabled

    def _encoding(
        self, entry: PlanEntry, layer: nn.Module, role: Role, spec: TensorSpec
    ) -> Encoding:
        assert spec.granularity is not None
        per_channel = spec.granularity.kind == "channel"
        transposed = entry.op.startswith("conv_transpose")
        common: dict[str, Any] = {
            "tensor": f"{entry.name}.{role}",
            "layer": entry.name,
            "role": role,
            "format": spec.format,
            "granularity": str(spec.granularity),
            "axis": (1 if transposed and role == "weight" else 0) if per_channel else None,
            "scale_format": spec.scale or "float32",
        }
        if spec.dynamic:
            return Encoding(**common, symmetric=bool(spec.symmetric), dynamic=True)
        if role == "bias":
            scale = self._proxy(entry, "input").scale() * layer.weight_quant.scale()  # type: ignore[operator, union-attr]
            return _static(common, scale.reshape(-1), torch.zeros(()), spec, signed=True)
        # One pass through the quantizer tells all; asking for each number would take one each.
        if role == "weight":
            numbers: Any = layer.quant_weight()  # type: ignore[operator]
        else:
            numbers = self._proxy(entry, role)(
                torch.zeros(1, device=layer.get_parameter("weight").device)
            )
        scale, zero_point = numbers.scale.reshape(-1), numbers.zero_point.reshape(-1)
        return _static(common, scale, zero_point, spec, signed=bool(numbers.signed))

    def _proxy(self, entry: PlanEntry, role: Role) -> Any:
        """The Brevitas quantizer that decides a tensor's scale."""
        layer = self.module.get_submodule(entry.name)
        if role == "weight":
            return layer.weight_quant
        own = getattr(layer, "input_quant", None)
        if own is not None and own.is_quant_enabled:
            return own
        return _upstream(self.module, entry.name)


def _static(
    common: dict[str, Any],
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    spec: TensorSpec,
    *,
    signed: bool,
) -> Encoding:
    fmt = spec.number_format
    half = 2 ** (fmt.bits - 1)
    zeros = zero_point.round().to(torch.int32).expand(scale.shape).clone()
    if fmt.signed and not signed:
        zeros -= half
    low = -half if fmt.signed else 0
    shape = scale.shape if common["axis"] is not None else ()
    scale, zeros = scale.detach().float().reshape(shape), zeros.reshape(shape)
    symmetric = bool((zeros == 0).all())
    return Encoding(
        **common,
        symmetric=symmetric and bool(spec.symmetric),
        scale=scale,
        zero_point=zeros,
        min=(low - zeros) * scale,
        max=(low + 2 * half - 1 - zeros) * scale,
    )


def _upstream(model: nn.Module, layer: str) -> Any:
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
