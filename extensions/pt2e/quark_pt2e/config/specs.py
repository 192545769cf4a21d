"""Configurations whose specs are built into the quantizer's own configuration objects."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from quark_core.config import QuantizationConfig
from quark_core.spec import LayerRule, Role, TensorSpec
from quark_pt2e.config.base import Pt2eConfig

_FIELDS = {
    "is_per_channel": "weight: int8/channel or int8/tensor",
    "is_dynamic": "input: int8/dynamic",
    "is_qat": "qat: true",
    "eps": "scale_floor",
    "epsilon": "scale_floor",
}
"""Arguments that fields stand for."""

LIMITS = ("act_qmin", "act_qmax", "weight_qmin", "weight_qmax")


class SpecConfig(Pt2eConfig):
    """A PT2E backend that takes the common specs.

    In a graph there are only tensors between operations: ``input`` is what operations read,
    ``output`` what they return. Where ``output`` is not given it follows ``input``.
    """

    headroom: Annotated[float, Field(ge=1, le=16)] = Field(
        default=1.0,
        description="Factor on observed ranges of static activations, for values that "
        "calibration did not see; 16-bit formats can afford it.",
    )
    scale_floor: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Smallest scale; null takes the quantizer's own."
    )

    config_arguments: dict[str, bool | int] = Field(
        default_factory=dict,
        description="Arguments of the quantizer's own configuration function that no field here "
        "stands for, such as act_qmin.",
    )

    own_arguments: ClassVar[tuple[str, ...]] = ()
    """What ``config_arguments`` may hold."""

    @model_validator(mode="after")
    def _own_arguments_exist(self) -> Self:
        for name, value in self.config_arguments.items():
            if name in _FIELDS:
                raise ValueError(f"config_arguments.{name}: write {_FIELDS[name]} instead")
            if name not in self.own_arguments:
                known = ", ".join(self.own_arguments) or "none"
                raise ValueError(
                    f"config_arguments.{name}: this quantizer's configuration takes no such "
                    f"argument beyond our fields. It takes: {known}"
                )
            if name.startswith(("act_", "weight_")):
                self._check_limit(name, value)
        for kind in ("act", "weight"):
            low, high = self.narrowed(kind, (-128, 127))
            if low >= high:
                raise ValueError(f"config_arguments: {kind}_qmin {low} is not below {high}")
        return self

    def _check_limit(self, name: str, value: bool | int) -> None:
        weights = [self.weight, *(rule.weight for rule in self.rules)] if "weight" in name else []
        specs = [spec for spec in weights if spec is not None]
        bits = min([8, *(spec.number_format.bits for spec in specs)])
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        if isinstance(value, bool) or not low <= value <= high:
            raise ValueError(
                f"config_arguments.{name}: {value!r} is no code of int{bits}: {low} to {high}"
            )

    def narrowed(self, kind: str, limits: tuple[int, int]) -> tuple[int, int]:
        """Smallest and largest 8-bit code of ``act`` or ``weight``, where arguments change them."""
        given = self.config_arguments
        return given.get(f"{kind}_qmin", limits[0]), given.get(f"{kind}_qmax", limits[1])

    def effective(
        self, holder: QuantizationConfig | LayerRule | None, role: Role
    ) -> TensorSpec | None:
        """The spec that holds for a rule, or for what no rule matches (None).

        A rule's own spec, else the configuration's; an output that nobody names is the input's.
        """
        if isinstance(holder, LayerRule):
            if holder.skip:
                return None
            if role in holder.model_fields_set:
                found: TensorSpec | None = getattr(holder, role)
                return found
            if role == "output" and "input" in holder.model_fields_set:
                return holder.input
        found = getattr(self, role)
        if role == "output" and found is None and "output" not in self.model_fields_set:
            return self.input
        return found
