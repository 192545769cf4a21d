"""The vocabulary of a quantization: how a tensor is represented, and which layers a rule means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from quark_core.errors import UnknownNameError
from quark_core.formats import NumberFormat, parse_format, with_block

Role = Literal["weight", "input", "output", "bias"]
ROLES: tuple[Role, ...] = get_args(Role)
ScaleFormat = Literal["float32", "power_of_two", "unit", "e8m0", "fp8_e4m3", "minifloat", "integer"]
ScaleRule = Literal["floor", "ceil", "even", "rceil"]
Rounding = Literal["nearest_even", "nearest_away", "toward_zero", "floor", "ceil", "stochastic"]
ObserverName = Literal["minmax", "moving_average", "percentile", "mse", "sqnr", "entropy"]

_UNSCALED = ("fixed", "denorm", "log")
_SELF_SCALED = ("binary", "binary_residual", "ternary")
_BLOCK_SCALES: Mapping[str, ScaleFormat] = {
    "nvfp": "fp8_e4m3",
    "sbfp": "minifloat",
    "lpbq": "integer",
}

_GRANULARITY = re.compile(
    r"(?P<plain>tensor|token)"
    r"|channel(?::(?P<channel_axis>-?\d+))?"
    r"|group:(?P<size>\d+)(?:@(?P<group_axis>-?\d+))?"
    r"|block:(?P<block>\d+(?:x\d+)+)"
)
_GRANULARITY_HELP = "tensor, token, channel, channel:AXIS, group:SIZE, group:SIZE@AXIS or block:AxB"


class FrozenModel(BaseModel):
    """A pydantic model that cannot be changed and knows all its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


@dataclass(frozen=True)
class Granularity:
    """Which elements share one scale.

    Attributes:
        kind: ``tensor`` (all), ``token`` (each vector along the last axis has its own),
            ``channel`` (each index of ``axis``), ``group`` (runs of ``size`` along ``axis``) or
            ``block`` (tiles of ``shape`` over the last axes).
        size: Elements of a group.
        shape: Sides of a tile.
        axis: The axis meant. None stands for the layer's own: a weight's output channels for
            ``channel``, its input channels for ``group``; the channels of an input or output
            (axis 1 of a batch of images or signals before a convolution, else the last).
    """

    kind: Literal["tensor", "token", "channel", "group", "block"]
    size: int | None = None
    shape: tuple[int, ...] | None = None
    axis: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the spelling a recipe uses, such as ``group:128``.

        Raises:
            ValueError: The text is no granularity; the message lists what is.
        """
        match = _GRANULARITY.fullmatch(text.strip().lower())
        if match is None:
            raise ValueError(f"unknown granularity {text!r}: accepted are {_GRANULARITY_HELP}")
        if match["plain"]:
            return cls("tensor" if match["plain"] == "tensor" else "token")
        if match["size"]:
            if int(match["size"]) == 0:
                raise ValueError("a group needs at least one element: group:0 has none")
            axis = match["group_axis"]
            return cls("group", size=int(match["size"]), axis=None if axis is None else int(axis))
        if match["block"]:
            shape = tuple(int(side) for side in match["block"].split("x"))
            if 0 in shape:
                raise ValueError(f"every side of a block needs at least one element: {text!r}")
            return cls("block", shape=shape)
        axis = match["channel_axis"]
        return cls("channel", axis=None if axis is None else int(axis))

    def __str__(self) -> str:
        if self.kind == "group":
            return f"group:{self.size}" + ("" if self.axis is None else f"@{self.axis}")
        if self.kind == "block":
            return "block:" + "x".join(str(side) for side in self.shape or ())
        if self.kind == "channel" and self.axis is not None:
            return f"channel:{self.axis}"
        return self.kind

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def read(value: Any) -> Granularity:
            if isinstance(value, Granularity):
                return value
            if isinstance(value, str):
                return cls.parse(value)
            raise ValueError(f"a granularity is text: accepted are {_GRANULARITY_HELP}")

        return core_schema.no_info_plain_validator_function(
            read, serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "pattern": f"^(?:{_json_pattern()})$", "examples": ["group:128"]}


def _or_text(schema: dict[str, Any], example: str) -> dict[str, Any]:
    """The JSON schema of a model that may also be written as text."""
    return {"anyOf": [{"type": "string", "examples": [example]}, schema]}


def _json_pattern() -> str:
    return re.sub(r"\?P<\w+>", "?:", _GRANULARITY.pattern)


class Observer(FrozenModel):
    """How calibration data becomes a range, and from it a scale and a zero point.

    A recipe may write the name alone, or ``percentile:99.9``.
    """

    name: ObserverName = "minmax"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    momentum: Annotated[float, Field(gt=0, le=1)] = 0.1

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        name, _, argument = value.partition(":")
        key = {"percentile": "percentile", "moving_average": "momentum"}.get(name)
        if not argument:
            return {"name": name}
        if key is None:
            raise ValueError(f"observer {name!r} takes no argument, got {value!r}")
        return {"name": name, key: argument}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return _or_text(handler.resolve_ref_schema(handler(schema)), "percentile:99.9")

    def __str__(self) -> str:
        if self.name == "percentile":
            return f"percentile:{self.percentile:g}"
        return f"moving_average:{self.momentum:g}" if self.name == "moving_average" else self.name


class TensorSpec(FrozenModel):
    """How one tensor of a layer is represented.

    Text is shorthand, parts in any order after the format: ``int4/group:128/asym``,
    ``int8/token/dynamic``, ``uint8/percentile:99.9``, ``mxfp4``. What is left out is filled in
    by :meth:`resolve` when the spec becomes part of a configuration.
    """

    format: str = Field(description="Number format, such as int8, fp8_e4m3 or mxfp4.")
    granularity: Granularity | None = Field(
        default=None, description=f"What shares one scale: {_GRANULARITY_HELP}."
    )
    symmetric: bool | None = Field(
        default=None, description="Whether zero lies in the middle of the range (no zero point)."
    )
    scale: ScaleFormat | None = Field(
        default=None, description="Number format of the scale; unit is no scale at all."
    )
    scale_rule: ScaleRule | None = Field(
        default=None, description="How the scale of an MX block is rounded to a power of two."
    )
    narrow: bool = Field(
        default=False, description="Leave the lowest code of a signed integer out (-127..127)."
    )
    observer: Observer | None = Field(
        default=None, description="How ranges are chosen from data; static ranges only."
    )
    rounding: Rounding = Field(default="nearest_even", description="Rounding of the elements.")
    dynamic: bool = Field(
        default=False, description="Compute the scale anew from each input instead of calibrating."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            return _read_shorthand(value)
        if not isinstance(value, Mapping | TensorSpec):
            raise ValueError(f"a spec is text such as int8/channel, or a mapping, not {value!r}")
        return value

    @field_validator("format")
    @classmethod
    def _canonical(cls, value: str) -> str:
        try:
            return parse_format(value).name
        except UnknownNameError as error:
            raise ValueError(str(error).rstrip(".")) from None

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return _or_text(handler.resolve_ref_schema(handler(schema)), "int4/group:128")

    @property
    def number_format(self) -> NumberFormat:
        """The parsed ``format``."""
        return parse_format(self.format)

    def resolve(self, role: Role) -> TensorSpec:
        """The same spec with nothing left open, as a tensor of ``role`` is treated by default.

        Weights and biases are symmetric per channel, inputs and outputs asymmetric per tensor
        (unsigned or not, since a zero point covers both). A block format brings its own
        granularity and scale.

        Raises:
            ValueError: The parts contradict each other.
        """
        fmt = self.number_format
        constant = role in ("weight", "bias")
        if constant and self.dynamic:
            raise ValueError(f"a {role} is constant: dynamic is for input and output")
        if self.narrow and (fmt.family != "integer" or not fmt.signed or fmt.bits < 2):
            raise ValueError(f"{fmt.name} has no narrow range: it is for signed integers")
        if self.scale_rule is not None and fmt.family != "mx":
            raise ValueError(f"{fmt.name} has no scale_rule: it is for the MX formats")
        if fmt.is_block:
            return self._resolve_block(fmt)
        if fmt.family in _UNSCALED or self.scale == "unit":
            return self._resolve_unscaled(fmt)
        affine = fmt.family == "integer"
        if self.symmetric is False and not affine:
            raise ValueError(f"{fmt.name} has no zero point: symmetric: false is for integers")
        symmetric = self.symmetric if self.symmetric is not None else constant or not affine
        if self.observer is not None and fmt.family in _SELF_SCALED:
            raise ValueError(f"{fmt.name} takes its scale from the tensor itself: no observer")
        measured = self.dynamic or fmt.family in _SELF_SCALED
        return self.model_copy(
            update={
                "granularity": self.granularity or Granularity("channel" if constant else "tensor"),
                "symmetric": symmetric,
                "scale": self.scale or "float32",
                "observer": None if measured else self.observer or Observer(),
            }
        )

    def _resolve_unscaled(self, fmt: NumberFormat) -> TensorSpec:
        whole = Granularity("tensor")
        for field, accepted in (("granularity", whole), ("observer", None), ("scale", "unit")):
            if getattr(self, field) not in (None, accepted):
                raise ValueError(f"{fmt.name} has no scale to choose: leave {field} out")
        if self.symmetric is False:
            raise ValueError(f"{fmt.name} has no zero point: symmetric: false is for integers")
        return self.model_copy(update={"granularity": whole, "symmetric": True, "scale": "unit"})

    def _resolve_block(self, fmt: NumberFormat) -> TensorSpec:
        wanted = self.granularity or Granularity("group", size=fmt.block)
        if wanted.kind != "group" or wanted.size is None:
            raise ValueError(
                f"{fmt.name} shares a scale in blocks of {fmt.block}: leave granularity out or "
                f"write group:SIZE, not {wanted}"
            )
        try:
            name = with_block(fmt, wanted.size).name
        except UnknownNameError as error:
            raise ValueError(str(error).rstrip(".")) from None
        scale = _BLOCK_SCALES.get(fmt.family, "e8m0")
        if self.scale not in (None, scale):
            raise ValueError(f"{fmt.name} has {scale} scales by definition, not {self.scale}")
        if self.symmetric is False:
            raise ValueError(f"{fmt.name} has no zero point: symmetric: false is for integers")
        if self.observer is not None:
            raise ValueError(
                f"{fmt.name} takes each block's scale from the block itself: leave observer out"
            )
        return self.model_copy(
            update={
                "format": name,
                "granularity": wanted,
                "symmetric": True,
                "scale": scale,
                "scale_rule": self.scale_rule or ("floor" if fmt.family == "mx" else None),
            }
        )

    def __str__(self) -> str:
        fmt = self.number_format
        parts = [self.format]
        if self.granularity and not fmt.is_block:
            parts.append(str(self.granularity))
        if self.symmetric is not None and fmt.family == "integer":
            parts.append("sym" if self.symmetric else "asym")
        if self.narrow:
            parts.append("narrow")
        if self.scale and self.scale != "float32" and not fmt.is_block:
            parts.append(self.scale)
        if self.observer and self.observer.name != "minmax":
            parts.append(str(self.observer))
        if self.scale_rule not in (None, "floor"):
            parts.append(f"scale:{self.scale_rule}")
        if self.rounding != "nearest_even":
            parts.append(self.rounding)
        if self.dynamic:
            parts.append("dynamic")
        return "/".join(parts)


def _read_shorthand(text: str) -> dict[str, Any]:
    first, *rest = (part.strip() for part in text.split("/"))
    fields: dict[str, Any] = {"format": first}
    for part in rest:
        key, value = _classify(part)
        if key in fields:
            raise ValueError(f"{text!r} says {key} twice")
        fields[key] = value
    return fields


_WORDS: Mapping[str, tuple[str, Any]] = {
    **{word: ("symmetric", word.startswith("sym")) for word in ("sym", "symmetric", "asym")},
    "asymmetric": ("symmetric", False),
    "narrow": ("narrow", True),
    "dynamic": ("dynamic", True),
    "static": ("dynamic", False),
    **{word: ("scale", word) for word in get_args(ScaleFormat)},
    **{word: ("rounding", word) for word in get_args(Rounding)},
    **{f"scale:{rule}": ("scale_rule", rule) for rule in get_args(ScaleRule)},
}


def _classify(part: str) -> tuple[str, Any]:
    word = part.lower()
    if word in _WORDS:
        return _WORDS[word]
    head = word.partition(":")[0]
    if head in get_args(ObserverName):
        return "observer", word
    if head in ("tensor", "token", "channel", "group", "block"):
        return "granularity", word
    raise ValueError(
        f"{part!r} is no part of a spec: after the format come a granularity "
        f"({_GRANULARITY_HELP}), sym or asym, narrow, dynamic, "
        f"a scale ({', '.join(get_args(ScaleFormat))}), scale:RULE "
        f"({', '.join(get_args(ScaleRule))}), "
        f"an observer ({', '.join(get_args(ObserverName))}) "
        f"or a rounding ({', '.join(get_args(Rounding))})"
    )


_CRITERIA = ("name", "glob", "re", "type", "op", "node", "io")


class Selector(FrozenModel):
    """Which layers are meant. Every key given must hold; at least one must be given.

    Attributes:
        name: Exact dotted name of the layer.
        glob: Shell pattern over the whole dotted name; ``*`` also crosses dots.
        re: Regular expression over the whole dotted name.
        type: Class name, bare or qualified; subclasses match too.
        op: Operation, as ``quark plan`` prints it: ``linear``, ``conv2d``, ``add``...
        node: Exact name of a graph's node, for backends that quantize graphs.
        io: The model's own ``input`` or ``output``.
    """

    name: str | None = None
    glob: str | None = None
    re: str | None = None
    type: str | None = None
    op: str | None = None
    node: str | None = None
    io: Literal["input", "output"] | None = None

    @field_validator("re")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.criteria():
            raise ValueError("a rule needs at least one of " + ", ".join(_CRITERIA))
        return self

    def criteria(self) -> dict[str, str]:
        """The keys given and their values."""
        values = {key: getattr(self, key) for key in _CRITERIA}
        return {key: value for key, value in values.items() if value is not None}

    def describe(self) -> str:
        """The selector in one line, such as ``glob: head*, type: Linear``."""
        return ", ".join(f"{key}: {value}" for key, value in self.criteria().items())


class LayerRule(Selector):
    """What shall differ for the selected layers.

    The last rule that matches a layer decides it alone: a tensor the rule leaves out gets the
    configuration's own spec, one it sets to null stays as it is in the float model.
    """

    skip: bool = Field(default=False, description="Leave the selected layers in float.")
    weight: TensorSpec | None = None
    input: TensorSpec | None = None
    output: TensorSpec | None = None
    bias: TensorSpec | None = None
    allow_unmatched: bool = Field(
        default=False, description="Accept that this rule matches no layer."
    )

    @model_validator(mode="after")
    def _skip_or_override(self) -> Self:
        given = [role for role in ROLES if role in self.model_fields_set]
        if self.skip and given:
            raise ValueError(f"skip: true leaves the layer alone: drop it, or drop {given[0]}")
        return self
