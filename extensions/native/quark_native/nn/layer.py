"""QuantizedLayer: what turns a float layer into a quantized one, whatever its arithmetic is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from quark_core.errors import QuantizationError
from quark_core.spec import Role, TensorSpec
from quark_native.quantizers import PackedParameter, TensorQuantizer


class QuantizedLayer(nn.Module):
    """Mixed in before a float layer's class; that class's own forward does the arithmetic.

    A layer becomes quantized by changing its class (see :mod:`quark_native.flows.eager`), so it
    keeps its place, names, hooks and everything that refers to it. Its input and output go
    through quantizers. A quantized weight or bias is held as packed codes, which alone are saved;
    the parameter of that name holds the decoded values, so that forward costs what it cost in
    float, and code that reads ``layer.weight`` sees the quantized weight.

    Attributes:
        input_quantizer: Quantizes the first argument, or None.
        output_quantizer: Quantizes the result, or None.
        packed: Packed weight and bias by name, shared between layers that shared a weight.
        specs: The spec of each quantized tensor.
        enabled: Whether the layer is quantized; if not it computes in float.
    """

    input_quantizer: TensorQuantizer | None
    output_quantizer: TensorQuantizer | None
    packed: nn.ModuleDict
    specs: Mapping[Role, TensorSpec]
    enabled: bool

    def setup(
        self,
        specs: Mapping[Role, TensorSpec],
        input_quantizer: TensorQuantizer | None,
        output_quantizer: TensorQuantizer | None,
    ) -> None:
        """Give a layer whose class was just changed its quantized parts."""
        self.specs = dict(specs)
        self.enabled = True
        self.packed = nn.ModuleDict()
        self.input_quantizer = input_quantizer
        self.output_quantizer = output_quantizer
        self.register_load_state_dict_post_hook(_decode_after_load)  # type: ignore[no-untyped-call]
        if input_quantizer is not None or output_quantizer is not None:
            # torch's fused TransformerEncoderLayer reads weights without calling the layers;
            # it steps aside where a layer has a hook.
            self.register_forward_pre_hook(_no_shortcut)

    def pack(self, role: str, packed: PackedParameter, decoded: nn.Parameter, keep: bool) -> None:
        """Replace a constant by packed codes.

        Args:
            role: ``weight`` or ``bias``.
            packed: The codes.
            decoded: Their values, without gradient; one parameter for layers that share them.
            keep: Keep the float values, for :meth:`set_enabled`.
        """
        if keep:
            values = self._parameters[role]
            assert values is not None
            self.register_buffer(f"float_{role}", values.detach(), persistent=False)
        self.packed[role] = packed
        self._parameters[role] = decoded

    def set_enabled(self, enabled: bool) -> None:
        """Compute in float, or quantized again.

        Raises:
            QuantizationError: The float values were not kept.
        """
        for role in self.packed:
            values = self._buffers.get(f"float_{role}")
            if values is None:
                raise QuantizationError(
                    f"the float {role} was not kept",
                    fix="Quantize with keep_float: true to switch layers",
                )
        self.enabled = enabled
        if enabled:
            self.decode()
        else:
            for role in self.packed:
                values = self._buffers[f"float_{role}"]
                assert values is not None
                self._parameters[role] = nn.Parameter(values, requires_grad=False)

    def decode(self) -> None:
        """Set weight and bias to the values of their codes, after the codes changed."""
        for role, packed in self.packed.items():
            current = self._parameters[role]
            assert current is not None and isinstance(packed, PackedParameter)  # noqa: PT018
            current.data = packed.decode(current.dtype).to(current.device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Quantize the first argument, compute as the float layer does, quantize the result."""
        if self.enabled and self.input_quantizer is not None:
            if args:
                args = (self.input_quantizer(args[0]), *args[1:])
            else:
                first = next(iter(kwargs))
                kwargs[first] = self.input_quantizer(kwargs[first])
        output = super().forward(*args, **kwargs)
        if self.enabled and self.output_quantizer is not None:
            output = self.output_quantizer(output)
        return output

    def extra_repr(self) -> str:
        """The float layer's description and the spec of each quantized tensor."""
        specs = ", ".join(f"{role}={spec}" for role, spec in self.specs.items())
        return ", ".join(part for part in (super().extra_repr(), specs) if part)

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for role in self.packed:
            del destination[prefix + role]

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        decoded = {prefix + role for role in self.packed}
        missing_keys[:] = [key for key in missing_keys if key not in decoded]


def _decode_after_load(layer: nn.Module, _incompatible: Any) -> None:
    if isinstance(layer, QuantizedLayer) and layer.enabled:
        layer.decode()


def _no_shortcut(_layer: nn.Module, _args: Any) -> None:
    """Do nothing; being registered is the point."""
