"""NativeModel: a model quantized by quark-native."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quark_core.errors import QuantizationError, did_you_mean
from quark_core.plan import Plan, PlanEntry
from quark_core.quantized import Encoding, QuantizedModel
from quark_core.spec import Role
from quark_native import storage
from quark_native.flows import eager
from quark_native.nn import QuantizedLayer
from quark_native.quantizers import Parameterized


class NativeModel(QuantizedModel):
    """A model whose quantized layers compute on dequantized values.

    Args:
        module: The model with frozen quantized layers.
        plan: The plan that was carried out.
        options: The configuration as plain data; saved for the reader.
    """

    def __init__(self, module: nn.Module, plan: Plan, options: dict[str, Any]) -> None:
        super().__init__(module, plan)
        self.options = options

    def encodings(self) -> list[Encoding]:
        """One entry for each quantized tensor, in the order of the plan."""
        found = []
        for name, layer in eager.layers(self.module, self.plan).items():
            entry = self.plan[name]
            found += [_encoding(entry, role, part) for role, part in _parts(layer)]
        return found

    def storage(self) -> dict[str, int]:
        """Bytes of each tensor in the file that :meth:`save` writes, headers left out.

        Packed codes count under the float tensor's name with their scales and zero points; what
        layers share counts once.
        """
        tensors, _ = storage.stored_tensors(self.module)
        homes = {}
        for name, layer in eager.layers(self.module, self.plan).items():
            for role, _ in _parts(layer):
                inside = f"packed.{role}" if role in layer.packed else f"{role}_quantizer"
                homes[f"{name}.{inside}".removeprefix(".")] = f"{name}.{role}".removeprefix(".")
        sizes: dict[str, int] = {}
        for name, tensor in tensors.items():
            home = homes.get(name.rpartition(".")[0], name)
            sizes[home] = sizes.get(home, 0) + tensor.numel() * tensor.element_size()
        return sizes

    def save(self, directory: Path) -> None:
        """Write ``model.safetensors`` and ``quantized.json``.

        Every tensor of the model is in it, so that nothing is taken from the float model again.
        """
        storage.write(Path(directory), self.module, self.plan, self.options)

    def set_enabled(self, layer: str, enabled: bool) -> None:
        """Switch the quantization of one layer off (float arithmetic) or on again.

        Raises:
            QuantizationError: There is no such quantized layer, or its float weight was not kept.
        """
        known = eager.layers(self.module, self.plan)
        if layer not in known:
            raise QuantizationError(
                "no such quantized layer",
                where=f"layer {layer!r}",
                fix=did_you_mean(layer, known) or "`quark plan` lists the layers",
            )
        try:
            known[layer].set_enabled(enabled)
        except QuantizationError as error:
            raise QuantizationError(error.what, where=f"layer {layer!r}", fix=error.fix) from None


def _parts(layer: QuantizedLayer) -> Iterator[tuple[Role, Parameterized]]:
    """The quantized tensors of a layer."""
    packed = dict(layer.packed.items())
    parts: dict[Role, nn.Module | None] = {
        "weight": packed.get("weight"),
        "input": layer.input_quantizer,
        "output": layer.output_quantizer,
        "bias": packed.get("bias"),
    }
    for role, part in parts.items():
        if isinstance(part, Parameterized):
            yield role, part


def _encoding(entry: PlanEntry, role: Role, part: Parameterized) -> Encoding:
    spec, layout, known = entry.specs[role], part.format.layout, part.known_parameters
    axis = None if layout.kind == "tensor" else layout.axis
    if axis is not None and role == "weight" and entry.shape is not None:
        axis %= len(entry.shape)
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    if known is not None:
        low, high = part.format.limits(known)
    return Encoding(
        tensor=f"{entry.name}.{role}",
        layer=entry.name,
        role=role,
        format=spec.format,
        granularity=str(spec.granularity),
        axis=axis,
        symmetric=spec.symmetric is not False,
        dynamic=known is None,
        scale=None if known is None else known.scale,
        zero_point=None if known is None else known.zero_point,
        min=low,
        max=high,
        scale_format=spec.scale or "float32",
    )
