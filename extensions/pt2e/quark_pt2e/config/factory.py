"""PresetConfig and FactoryConfig: quantizers that are configured in their own terms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from quark_core.spec import FrozenModel, LayerRule
from quark_core.support import Support
from quark_pt2e.config.base import Pt2eConfig

_PLACE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class OwnTermsConfig(Pt2eConfig):
    """A quantizer that decides itself what becomes of a tensor.

    Rules can leave layers in float (``skip: true``), and take layers in again that an earlier
    rule left out (a rule without anything but its selector).
    """

    supports: ClassVar[Sequence[Support]] = ()

    @model_validator(mode="before")
    @classmethod
    def _no_specs(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        holders = [("", data)]
        rules = data.get("rules")
        if isinstance(rules, list | tuple):
            holders += [(f"rules[{i}].", rule) for i, rule in enumerate(rules)]
        for place, holder in holders:
            for role in ("weight", "input", "output", "bias"):
                given = (
                    role in holder.model_fields_set
                    if isinstance(holder, LayerRule)
                    else isinstance(holder, dict) and holder.get(role) is not None
                )
                if given:
                    raise ValueError(
                        f"{place}{role}: this quantizer chooses formats itself: leave {role} out, "
                        "and use arguments and config_arguments"
                    )
        return data


class PresetConfig(OwnTermsConfig):
    """A quantizer of ExecuTorch or torchao under its own defaults."""

    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the quantizer's class."
    )
    config_arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="Keyword arguments of the function that makes the quantizer's configuration.",
    )


class Part(FrozenModel):
    """One quantizer by its import path.

    Attributes:
        quantizer_class: ``package.module:Class`` of a torchao Quantizer.
        arguments: Keyword arguments of the class.
        config_factory: ``package.module:function`` that makes the quantizer's configuration.
        config_arguments: Keyword arguments of that function.
        config_method: Method of the quantizer that takes the configuration.
    """

    quantizer_class: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    config_factory: str | None = None
    config_arguments: dict[str, Any] = Field(default_factory=dict)
    config_method: str = "set_global"

    @field_validator("quantizer_class", "config_factory")
    @classmethod
    def _is_place(cls, value: str | None) -> str | None:
        if value is not None and _PLACE.fullmatch(value) is None:
            raise ValueError(f"{value!r} is no import path: write package.module:Name")
        return value


class FactoryConfig(OwnTermsConfig):
    """Any PT2E quantizer, or several in order.

    Give one by ``quantizer_class`` and what goes with it, or a list under ``quantizers``: each
    annotates what those before it left.
    """

    quantizer_class: str | None = Field(
        default=None, description="package.module:Class of a torchao Quantizer."
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the class."
    )
    config_factory: str | None = Field(
        default=None,
        description="package.module:function that makes the quantizer's configuration.",
    )
    config_arguments: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of that function."
    )
    config_method: str = Field(
        default="set_global", description="Method of the quantizer that takes the configuration."
    )
    quantizers: tuple[Part, ...] = Field(
        default=(), description="Several quantizers instead of one, first come first served."
    )

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if (self.quantizer_class is None) == (not self.quantizers):
            raise ValueError("give either quantizer_class or quantizers")
        self.parts()
        return self

    def parts(self) -> tuple[Part, ...]:
        """The quantizers, in order."""
        if self.quantizer_class is None:
            return self.quantizers
        return (
            Part(
                quantizer_class=self.quantizer_class,
                arguments=self.arguments,
                config_factory=self.config_factory,
                config_arguments=self.config_arguments,
                config_method=self.config_method,
            ),
        )
