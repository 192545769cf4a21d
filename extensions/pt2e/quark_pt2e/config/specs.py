"""Configurations whose specs are built into the quantizer's own configuration objects."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from quark_core.config import QuantizationConfig
from quark_core.spec import LayerRule, Role, TensorSpec
from quark_pt2e.config.base import Pt2eConfig


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
