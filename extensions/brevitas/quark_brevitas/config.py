"""BrevitasConfig: the common fields Brevitas can carry out, and its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from quark_brevitas import checks
from quark_brevitas.formats import FLOATS, INTEGERS, MX, SIGNED, float_refusal, is_static
from quark_brevitas.options import (
    AWQ,
    INSTEAD,
    ActivationEqualization,
    Algorithm,
    Attention,
    LowRank,
    MagR,
    Rotation,
    accumulator_of,
)
from quark_core.config import QuantizationConfig
from quark_core.spec import LayerRule, Role, TensorSpec
from quark_core.support import Support

_OTHER_BACKENDS = {
    "eager": "Brevitas 0.13 has no such backend, as its quantize needs a traced graph; write "
    "layerwise, which takes a model as it is, or fx",
    "flexml": "it is fx with power-of-two scales, int16 biases and poolings of one processor; "
    "write fx, and power_of_two after the formats",
}
_SHARED = ("tensor", "channel", "group")
_RUNTIME = ("tensor", "token", "channel", "group")
_SCALES: tuple[Literal["float32", "power_of_two"], ...] = ("float32", "power_of_two")


class BrevitasConfig(QuantizationConfig):
    """Post-training quantization by Brevitas 0.13.

    ``layerwise`` replaces each layer by Brevitas's own, with an input quantizer in it; ``fx``
    places quantizers along the traced graph, so that additions see equal scales.

    ``minmax`` and ``percentile`` ranges of inputs are taken batch by batch and averaged over the
    batches, which is how Brevitas calibrates. A dynamic input of ``channel:0`` has one scale a
    sample.
    """

    supports: ClassVar[Sequence[Support]] = (
        Support(("weight",), INTEGERS, _SHARED, (True, False), observer=("minmax", "mse")),
        Support(("weight",), SIGNED, _SHARED, scale=("power_of_two",), observer=("minmax", "mse")),
        Support(
            ("weight",), SIGNED, _SHARED, scale=_SCALES, observer=("minmax", "mse"), narrow=(True,)
        ),
        Support(("weight",), FLOATS, _SHARED, scale=_SCALES, observer=("minmax", "mse")),
        Support(("weight",), MX, ("group",), scale=("e8m0",), observer=()),
        Support(
            ("input",),
            INTEGERS,
            ("tensor",),
            (True, False),
            scale=_SCALES,
            observer=("minmax", "percentile", "mse"),
        ),
        Support(
            ("input",),
            FLOATS,
            ("tensor",),
            scale=_SCALES,
            observer=("minmax", "percentile", "mse"),
        ),
        Support(("input",), SIGNED, _RUNTIME, scale=_SCALES, observer=(), dynamic=(True,)),
        Support(
            ("input",),
            INTEGERS,
            ("tensor", "token", "channel"),
            (False,),
            scale=_SCALES,
            observer=(),
            dynamic=(True,),
        ),
        Support(("input",), FLOATS, _RUNTIME, scale=_SCALES, observer=(), dynamic=(True,)),
        Support(("input",), MX, ("group",), scale=("e8m0",), observer=(), dynamic=(True, False)),
        Support(("bias",), ("int16", "int32"), ("channel",)),
    )

    instead: ClassVar[Mapping[str, str]] = INSTEAD

    backend: Literal["layerwise", "fx"] = Field(
        default="layerwise", description="How Brevitas rewrites the model: layerwise or fx."
    )
    unsigned_relu: bool = Field(
        default=True,
        description="With fx, symmetric integers after a ReLU or Sigmoid are unsigned.",
    )
    unscaled_inputs: bool = Field(
        default=False,
        description="Round minifloat inputs as they are, with no scale and no calibration.",
    )
    narrow_range: bool = Field(
        default=False, description="Leave the smallest code of symmetric integer weights unused."
    )
    hqo: bool = Field(
        default=False,
        description="Search scales or zero points of integer weights by half-quadratic "
        "optimization; slow.",
    )
    scale_rounding: Literal["round", "ceil", "floor", "midmax"] | None = Field(
        default=None,
        description="How power-of-two scales are rounded; null is up, and down for MX formats.",
    )
    round_zero_points: bool = Field(
        default=True, description="Round zero points of weights to integers, so as to be stored."
    )
    pad_groups: bool = Field(
        default=False,
        description="Let the last group of a weight be shorter where SIZE does not divide its "
        "inputs. MX formats always do.",
    )
    merge_bn: bool = Field(
        default=True, description="Fold BatchNorm into the layers before it; needs tracing."
    )
    equalize_iterations: int = Field(
        default=0, ge=0, description="Rounds of cross-layer weight equalization; needs tracing."
    )
    equalize_merge_bias: bool = Field(
        default=True, description="Let biases count when weights are equalized."
    )
    equalize_scale: Literal["maxabs", "range"] = Field(
        default="maxabs", description="What is equalized: largest magnitudes or ranges."
    )
    equalize_bias_shrinkage: float | None = Field(
        default=None,
        gt=0,
        description="Biases count divided by this; null chooses from their sizes.",
    )
    channel_splitting: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of channels to split in two, those with the largest weights first; "
        "needs tracing.",
    )
    split_inputs: bool = Field(
        default=False, description="Split channels of inputs instead of outputs."
    )
    attention: Attention | None = Field(
        default=None,
        description="Quantize within scaled dot-product attention; needs data to find its calls.",
    )
    merge_layernorm: bool = Field(
        default=False,
        description="Let Linear layers take over weight and bias of the norm before them.",
    )
    layernorm_to_rmsnorm: bool = Field(
        default=False,
        description="Take means out of the layers before a LayerNorm, so that it need not; needs "
        "merge_layernorm.",
    )
    rotation: Rotation | None = Field(
        default=None, description="Rotate layers' inputs and weights, which spreads outliers."
    )
    activation_equalization: ActivationEqualization | None = Field(
        default=None, description="SmoothQuant; needs data."
    )
    magr: MagR | None = Field(
        default=None, description="Shrink large weights before quantizing; needs data."
    )
    awq: AWQ | None = Field(
        default=None, description="Scale input channels by what quantizing costs; needs data."
    )
    low_rank: LowRank | None = Field(
        default=None, description="SVDQuant: a float branch of low rank beside each Linear layer."
    )
    algorithm: Algorithm | None = Field(
        default=None,
        description="How codes of weights are chosen: null is to the nearest; gptq, gpfq, qronos "
        "and learned_round need data.",
    )
    calibrate_bn: bool = Field(
        default=False, description="Adapt BatchNorm to quantized layers; needs merge_bn: false."
    )
    bias_correction: bool = Field(
        default=False, description="Shift biases so that mean outputs stay; needs data."
    )

    gguf_tokenizer: str | None = Field(
        default=None,
        description="GGUF file, folder with tokenizer.json, or PACKAGE:FILE, whose vocabulary a "
        "GGUF export takes over.",
    )

    @classmethod
    def refuses(cls, spec: TensorSpec, role: Role) -> str | None:
        """What the table of formats cannot say: widths of minifloats, axes, group sizes."""
        fmt, granularity = spec.number_format, spec.granularity
        if fmt.name.startswith("fp[") and (reason := float_refusal(fmt)) is not None:
            return reason
        assert granularity is not None
        if role == "input" and granularity.kind == "channel" and granularity.axis != 0:
            return (
                "Brevitas has no scales for the channels of an input: write tensor, or channel:0 "
                "for one scale a sample"
            )
        if role != "input" and granularity.axis is not None:
            return (
                f"Brevitas chooses the axis of a {role}'s scales itself: write {granularity.kind}"
            )
        if granularity.kind == "group" and granularity.axis is not None:
            return "Brevitas groups an input along its channels: write group:SIZE without an axis"
        if granularity.kind == "group" and granularity.size == 1:
            return "a group of one element needs a scale for each: write a larger group"
        return None

    @field_validator("backend", mode="before")
    @classmethod
    def _known_backend(cls, value: Any) -> Any:
        """Tell what stands for names that Brevitas's documents know."""
        if value in _OTHER_BACKENDS:
            raise ValueError(f"{value!r} is not accepted: {_OTHER_BACKENDS[value]}")
        return value

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        for place, holder in self._places():
            self._check(place, holder)
        self._check_options()
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
        if bias is not None:
            self._check_bias(place, weight, inputs)

    @staticmethod
    def _check_bias(place: str, weight: TensorSpec | None, inputs: TensorSpec | None) -> None:
        """A bias's scale is the product of the weight's and the input's."""
        if inputs is None or inputs.dynamic or inputs.number_format.family != "integer":
            raise ValueError(
                f"{place}bias: Brevitas takes the bias's scale from a static integer input's: "
                "write input: int8, or leave bias out"
            )
        grouped = (
            weight is not None
            and weight.granularity is not None
            and weight.granularity.kind == "group"
        )
        if weight is not None and (grouped or weight.number_format.family != "integer"):
            raise ValueError(
                f"{place}bias: Brevitas takes the bias's scale from an integer weight's, one a "
                "channel or tensor: write weight: int8/channel, or leave bias out"
            )

    def _effective(self, holder: QuantizationConfig | LayerRule, role: Role) -> TensorSpec | None:
        """The spec that holds: a rule's own, or the configuration's where the rule is silent."""
        silent = isinstance(holder, LayerRule) and role not in holder.model_fields_set
        found: TensorSpec | None = getattr(self if silent else holder, role)
        return found

    def _check_options(self) -> None:
        """Refuse options that a spec leaves nothing to do, or that Brevitas has no code for."""
        weights = [
            (place, spec)
            for place, holder in self._places()
            if not (isinstance(holder, LayerRule) and holder.skip)
            and (spec := self._effective(holder, "weight")) is not None
        ]
        for place, spec in weights:
            if self.hqo and (problem := _hqo_refusal(spec, self.round_zero_points)):
                raise ValueError(f"{place}weight: {problem}")
        self._check_accumulator()
        self._check_passes(bool(weights))
        checks.awq(self, bool(weights))
        checks.folding(self)
        checks.low_rank(self, bool(weights))
        checks.learned_round(self, weights)
        checks.rotation(self, bool(weights))
        checks.attention(self)
        checks.inputs(self, self._places())
        if not self.round_zero_points and all(spec.symmetric for _, spec in weights):
            raise ValueError("round_zero_points: symmetric weights have none: write asym, or true")
        if self.narrow_range and not any(_narrowable(spec) for _, spec in weights):
            raise ValueError("narrow_range: only symmetric integer weights have such a range")
        self._check_scale_rounding()

    def _check_passes(self, weights: bool) -> None:
        """Refuse passes that contradict each other or have nothing to work on."""
        equalization = self.activation_equalization
        if not weights and (self.algorithm or self.magr or equalization):
            given = "algorithm" if self.algorithm else "magr" if self.magr else ""
            raise ValueError(
                f"{given or 'activation_equalization'} works on weights that are quantized: give "
                "weight a spec, such as int8/channel"
            )
        if self.calibrate_bn and self.merge_bn:
            raise ValueError(
                "calibrate_bn: BatchNorm is folded away by then: write merge_bn: false too"
            )
        refinements = {"equalize_scale", "equalize_bias_shrinkage"} & self.model_fields_set
        if refinements and not self.equalize_iterations:
            raise ValueError(
                f"{min(refinements)}: nothing is equalized: give equalize_iterations, such as 20"
            )
        if self.equalize_bias_shrinkage is not None and not self.equalize_merge_bias:
            raise ValueError(
                "equalize_bias_shrinkage: biases do not count: write equalize_merge_bias: true"
            )
        if self.split_inputs and not self.channel_splitting:
            raise ValueError("split_inputs: nothing is split: give channel_splitting, such as 0.1")
        if self.backend == "fx" and equalization is not None and equalization.mode == "layerwise":
            raise ValueError(
                "activation_equalization.mode: layerwise puts a factor before each layer, which "
                "fx cannot see through: write mode: fx"
            )

    @property
    def attention_spec(self) -> TensorSpec | None:
        """The resolved spec of attention's tensors."""
        return None if self.attention is None else self.attention.spec.resolve("input")

    def _check_accumulator(self) -> None:
        """Refuse a register for what is not summed up as integers with one scale."""
        register = accumulator_of(self.algorithm)
        if register is None:
            return
        if self.backend == "fx":
            raise ValueError(
                "algorithm.accumulator: with fx, codes of inputs depend on what stands before a "
                "layer: write backend: layerwise"
            )
        for place, holder in self._places():
            weight, inputs = self._effective(holder, "weight"), self._effective(holder, "input")
            if (isinstance(holder, LayerRule) and holder.skip) or weight is None:
                continue
            if inputs is None or inputs.number_format.family != "integer":
                raise ValueError(
                    f"{place}input: an accumulator sums up products with integer inputs: write "
                    "input: int8, or leave algorithm.accumulator out"
                )
            if weight.number_format.family != "integer" or not weight.symmetric:
                raise ValueError(
                    f"{place}weight: an accumulator sums up integers without zero points: write "
                    "weight: int8/sym, or leave algorithm.accumulator out"
                )
            assert weight.granularity is not None
            groups = weight.granularity.size if weight.granularity.kind == "group" else None
            if groups is not None and groups != register.tile:
                raise ValueError(
                    f"{place}weight: groups of {groups} have scales of their own, which one "
                    f"accumulator cannot sum up: write algorithm.accumulator.tile: {groups}"
                )

    def _check_scale_rounding(self) -> None:
        if self.scale_rounding is None:
            return
        roles: tuple[Role, ...] = ("weight", "input")
        specs = [
            spec
            for _, holder in self._places()
            for role in roles
            if (spec := self._effective(holder, role)) is not None
        ]
        if self.attention_spec is not None:
            specs.append(self.attention_spec)
        rounded = [spec for spec in specs if spec.scale in ("power_of_two", "e8m0")]
        if not rounded:
            raise ValueError(
                "scale_rounding: only power-of-two scales are rounded: write power_of_two after "
                "the format, or leave it out"
            )
        for spec in rounded:
            if self.scale_rounding == "midmax" and spec.number_format.exponent is None:
                raise ValueError(
                    "scale_rounding: midmax belongs to floating-point elements, not "
                    f"{spec.format}: write round"
                )

    def _check_fx(self) -> None:
        if not is_static(self.input):
            raise ValueError("input: fx needs static inputs: write backend: layerwise, or int8")
        if self.input is not None and self.input.number_format.family != "integer":
            raise ValueError(
                f"input: fx shares scales between {self.input.format} inputs of an addition, "
                "which Brevitas can do for integers only: write backend: layerwise, or int8"
            )
        for index, rule in enumerate(self.rules):
            changed = [role for role in ("input", "bias") if role in rule.model_fields_set]
            if rule.skip or changed:
                what = "skips a layer" if rule.skip else f"changes {changed[0]}"
                raise ValueError(
                    f"rules[{index}] {what}, but fx quantizes activations along the whole graph: "
                    "write backend: layerwise"
                )


def _hqo_refusal(spec: TensorSpec, rounded: bool) -> str | None:
    assert spec.granularity is not None
    if spec.number_format.family != "integer" or spec.scale != "float32":
        return f"hqo is for integers with float32 scales, not {spec}: write hqo: false"
    if spec.granularity.kind == "group" and spec.symmetric:
        return f"Brevitas has hqo for groups with zero points only: write {spec.format}/" + (
            f"{spec.granularity}/asym, or hqo: false"
        )
    if rounded and not spec.symmetric:
        return (
            "hqo finds zero points between integers, and rounding them undoes it: write "
            f"round_zero_points: false, or {spec.format}/sym"
        )
    if spec.observer is not None and spec.observer.name != "minmax":
        return f"hqo is a search of its own: leave {spec.observer} out"
    return None


def _narrowable(spec: TensorSpec) -> bool:
    return spec.number_format.family == "integer" and spec.symmetric is True
