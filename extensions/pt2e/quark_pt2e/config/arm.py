"""EthosUConfig, VgfConfig and TosaConfig: Arm's quantizers, which share one arithmetic."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from quark_core.spec import FrozenModel, LayerRule, ObserverName
from quark_core.support import Support
from quark_pt2e.config.specs import LIMITS, SpecConfig

_OBSERVERS: tuple[ObserverName, ...] = ("minmax", "moving_average", "mse")
_SIZES = {
    "ethos-u55": (32, 64, 128, 256),
    "ethos-u65": (256, 512),
    "ethos-u85": (128, 256, 512, 1024, 2048),
}
TARGETS = tuple(f"{core}-{macs}" for core, sizes in _SIZES.items() for macs in sizes)
"""Ethos-U devices that Vela compiles for."""

Specs = Mapping[str, Any]
"""Specs by role, as a recipe writes them: ``{"weight": "int8/channel", "input": "int16"}``."""


class PassOptions(FrozenModel):
    """Choices within Arm's lowering.

    Attributes:
        softmax: ``masked`` or ``stable``.
        leaky_relu: ``table`` or ``decompose``.
        quantize_inf: What stands for -inf and +inf, which integers do not have.
    """

    softmax: Literal["masked", "stable"] | None = None
    leaky_relu: Literal["table", "decompose"] | None = None
    quantize_inf: tuple[float, float] | None = None


class ArmConfig(SpecConfig):
    """Integer quantization as TOSA defines it.

    8x8 is ``weight: int8, input: int8``; 16x8 is ``weight: int8, input: int16/sym``; 8x4 is
    ``weight: int4, input: int8``. Biases become int32 at input scale times weight scale. The
    observer ``mse`` is the histogram observer, ExecuTorch's own choice.
    """

    supports: ClassVar[Sequence[Support]] = (
        Support(("weight",), ("int8", "int4"), ("tensor", "channel")),
        Support(("input", "output"), ("int8", "uint8"), symmetric=(False,), observer=_OBSERVERS),
        Support(("input", "output"), ("int16",), observer=_OBSERVERS),
        Support(("bias",), ("int32",), ("tensor", "channel")),
    )
    own_arguments: ClassVar[tuple[str, ...]] = LIMITS

    precedence: Literal["last_match", "executorch"] = Field(
        default="last_match",
        description="Who wins where rules overlap: the last, for every selector and with "
        "subclasses (last_match), or whatever ExecuTorch's own set_* calls do (executorch).",
    )
    composable: bool = Field(
        default=True,
        description="Use ExecuTorch's composable quantizer; false takes the deprecated one.",
    )
    passes: PassOptions = Field(
        default_factory=PassOptions, description="Choices within Arm's lowering."
    )

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if not self.composable and self.precedence != "executorch":
            raise ValueError(
                "composable: false knows only ExecuTorch's precedence: add precedence: executorch"
            )
        for place, holder in self._places():
            if not (isinstance(holder, LayerRule) and holder.skip):
                self._check(place, holder)
        if self.precedence == "executorch":
            self._check_rules()
        return self

    def _places(self) -> list[tuple[str, SpecConfig | LayerRule]]:
        return [("", self), *((f"rules[{i}].", rule) for i, rule in enumerate(self.rules))]

    def _check(self, place: str, holder: SpecConfig | LayerRule) -> None:
        """Refuse what Arm's quantizer would only find out about in the middle."""
        weight, read = self.effective(holder, "weight"), self.effective(holder, "input")
        made, edge = self.effective(holder, "output"), getattr(holder, "io", None)
        for role, spec in (("input", read), ("output", made)):
            if spec is not None and spec.format == "uint8" and edge is None:
                raise ValueError(
                    f"{place}{role}: uint8 exists only at the model's ends: write int8 here, and "
                    "a rule such as {io: input, input: uint8}"
                )
        if weight is not None and read is None and not edge:
            raise ValueError(
                f"{place}input: Arm quantizes no weight alone: give input a spec too, such as int8"
            )
        if read is not None and made is not None and not edge and read.format != made.format:
            raise ValueError(
                f"{place}output: {made.format} does not go with input {read.format}: an integer "
                "operation reads and returns one width; change the width by a rule for another "
                "layer"
            )

    def _check_rules(self) -> None:
        for index, rule in enumerate(self.rules):
            keys = set(rule.criteria())
            if len(keys) != 1 or not keys <= {"name", "type", "io"}:
                raise ValueError(
                    f"rules[{index}]: ExecuTorch's precedence knows rules with one of name, type "
                    f"and io, not {' and '.join(sorted(keys))}: drop precedence: executorch"
                )
        ends = [rule for rule in self.rules if rule.io is not None]
        if ends and not self.composable and {rule.io for rule in ends} != {"input", "output"}:
            raise ValueError("composable: false treats both ends alike: give a rule for each io")

    # The four methods under ExecuTorch's names, for configurations built in Python.

    def set_global(self, specs: Specs | None) -> Self:
        """A copy in which ``specs`` (None: nothing) hold for all that no rule matches."""
        roles: dict[str, Any] = dict.fromkeys(("weight", "input", "output", "bias"))
        data = {key: value for key, value in self._given().items() if key not in roles}
        return type(self)(**data, **(specs or {}))

    def set_io(self, specs: Specs | None) -> Self:
        """A copy with rules for the model's inputs and outputs; None leaves them alone."""
        return self._with({"io": "input"}, specs)._with({"io": "output"}, specs)

    def set_module_name(self, name: str, specs: Specs | None) -> Self:
        """A copy with a rule for the module ``name`` and all within it; None leaves it float."""
        return self._with({"name": name}, specs)

    def set_module_type(self, type_: type | str, specs: Specs | None) -> Self:
        """A copy with a rule for all modules of a class; None leaves them float."""
        name = type_ if isinstance(type_, str) else f"{type_.__module__}.{type_.__qualname__}"
        return self._with({"type": name}, specs)

    def _with(self, selector: dict[str, str], specs: Specs | None) -> Self:
        rule = {**selector, **({"skip": True} if specs is None else specs)}
        data = self._given()
        return type(self)(**{**data, "rules": (*self.rules, rule)})

    def _given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.model_fields_set}


class EthosUConfig(ArmConfig):
    """Arm's Ethos-U NPUs: U55, U65, U85."""

    target: str = Field(
        default="ethos-u55-128", description="The device: ethos-u55-128, ethos-u85-256..."
    )
    more_targets: tuple[str, ...] = Field(
        default=(), description="Further devices to write a program for."
    )
    system_config: str | None = Field(
        default=None, description="Vela's system configuration; null takes the target's usual one."
    )
    memory_mode: str | None = Field(
        default=None, description="Vela's memory mode; null takes the target's usual one."
    )
    vela_flags: tuple[str, ...] = Field(default=(), description="More flags for Vela.")

    @field_validator("target", "more_targets")
    @classmethod
    def _known(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (value,) if isinstance(value, str) else value:
            if name not in TARGETS:
                raise ValueError(f"no Ethos-U is called {name!r}: there are {', '.join(TARGETS)}")
        return value

    @field_validator("vela_flags")
    @classmethod
    def _no_blanks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for flag in value:
            if re.search(r"\s", flag):
                raise ValueError(f"{flag!r}: Vela's flags are cut at blanks, so hold none")
        return value


class TosaConfig(ArmConfig):
    """Any device that runs TOSA's integer profile."""

    profile: str = Field(
        default="TOSA-1.0+INT+int16+int4", description="TOSA version, profile and extensions."
    )


class VgfConfig(ArmConfig):
    """Vulkan devices through VGF files."""

    snorm: bool = Field(
        default=False,
        description="Keep int8 activations within [-127, 127], as signed normalised images need.",
    )
