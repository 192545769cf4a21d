"""BrevitasConfig: the common fields Brevitas can carry out, and its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from quark_core.config import QuantizationConfig
from quark_core.spec import LayerRule, Role, TensorSpec
from quark_core.support import Support, integers

_FORMATS = (*integers(2, 8), *integers(2, 8, signed=False))
_SIGNED = integers(2, 8)


class BrevitasConfig(QuantizationConfig):
    """Post-training quantization by Brevitas 0.13.

    ``layerwise`` replaces each layer by Brevitas's own, with an input quantizer in it; ``fx``
    places quantizers along the traced graph, so that additions see equal scales.

    ``minmax`` and ``percentile`` ranges of inputs are taken batch by batch and averaged over the
    batches, which is how Brevitas calibrates.
    """

    supports: ClassVar[Sequence[Support]] = (
        Support(
            ("weight",), _FORMATS, ("tensor", "channel"), (True, False), observer=("minmax", "mse")
        ),
        Support(
            ("weight",),
            _SIGNED,
            ("tensor", "channel"),
            scale=("power_of_two",),
            observer=("minmax", "mse"),
        ),
        Support(
            ("input",), _FORMATS, ("tensor",), (True, False), observer=("minmax", "percentile")
        ),
        Support(
            ("input",),
            _SIGNED,
            ("tensor",),
            (True, False),
            scale=("power_of_two",),
            observer=("minmax", "percentile"),
        ),
        Support(("input",), _SIGNED, ("tensor", "token"), observer=(), dynamic=(True,)),
        Support(("bias",), ("int16", "int32"), ("channel",)),
    )

    backend: Literal["layerwise", "fx"] = Field(
        default="layerwise", description="How Brevitas rewrites the model: layerwise or fx."
    )
    merge_bn: bool = Field(
        default=True, description="Fold BatchNorm into the layers before it; needs tracing."
    )
    equalize_iterations: int = Field(
        default=0, ge=0, description="Rounds of cross-layer weight equalization; needs tracing."
    )
    bias_correction: bool = Field(
        default=False, description="Shift biases so that mean outputs stay; needs data."
    )

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        for place, holder in self._places():
            self._check(place, holder)
        if self.backend == "fx":
            self._check_fx()
        return self

    def _places(self) -> list[tuple[str, QuantizationConfig | LayerRule]]:
        return [("", self), *((f"rules[{i}].", rule) for i, rule in enumerate(self.rules))]

    def _check(self, place: str, holder: QuantizationConfig | LayerRule) -> None:
        """Refuse what Brevitas would only find out about in the middle."""
        weight, bias = self._effective(holder, "weight"), self._effective(holder, "bias")
        inputs = self._effective(holder, "input")
        if isinstance(holder, LayerRule) and holder.skip:
            return
        if weight is None and (inputs is not None or bias is not None):
            raise ValueError(
                f"{place}weight: Brevitas quantizes inputs and biases beside a weight: give "
                "weight a spec too, such as int8/channel"
            )
        if bias is not None and (inputs is None or inputs.dynamic):
            raise ValueError(
                f"{place}bias: Brevitas takes the bias's scale from a static input scale: write "
                "input: int8, or leave bias out"
            )

    def _effective(self, holder: QuantizationConfig | LayerRule, role: Role) -> TensorSpec | None:
        """The spec that holds: a rule's own, or the configuration's where the rule is silent."""
        silent = isinstance(holder, LayerRule) and role not in holder.model_fields_set
        found: TensorSpec | None = getattr(self if silent else holder, role)
        return found

    def _check_fx(self) -> None:
        if self.input is None or self.input.dynamic:
            raise ValueError("input: fx needs static inputs: write backend: layerwise, or int8")
        for index, rule in enumerate(self.rules):
            changed = [role for role in ("input", "bias") if role in rule.model_fields_set]
            if rule.skip or changed:
                what = "skips a layer" if rule.skip else f"changes {changed[0]}"
                raise ValueError(
                    f"rules[{index}] {what}, but fx quantizes activations along the whole graph: "
                    "write backend: layerwise"
                )
