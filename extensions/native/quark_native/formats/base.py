"""Format: the common interface of all number formats.

Almost every format here represents a value as

    x' = (element(code) - zero_point) * scale

where the layout says which elements share a scale. A format is therefore a rule that finds the
scale (:meth:`Format.measure`, :meth:`Format.cover`) and a set of elements with a rounding to
them. What is computed here in plain torch is the specification; the kernels equal it bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quark_core.formats import NumberFormat
from quark_core.spec import Role, Rounding, ScaleFormat, TensorSpec
from quark_native.formats.bits import EXPONENT_BIAS, exponent_of_power, power_of_two
from quark_native.formats.layout import Layout
from quark_native.formats.rounding import Rounder, noise
from quark_native.kernels import dispatch
from quark_native.kernels.call import Call
from quark_native.kernels.cpu import Launch

if TYPE_CHECKING:
    from quark_native.packed import PackedTensor

SCALE_NAN = 255
"""The stored exponent that means NaN; E8M0 in OCP Microscaling Formats 1.0, section 5.4.1."""


@dataclass(frozen=True)
class Parameters:
    """What a scale's elements share.

    Attributes:
        scale: float32, one value a scale in the layout's compact shape: what elements are
            multiplied by.
        zero_point: Integers like ``scale``, or None where zero is the middle.
        outer: In formats whose scales have a scale themselves, that one; part of ``scale``
            already.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    outer: Tensor | None = None


@dataclass(frozen=True)
class Encoded:
    """A tensor in codes.

    Attributes:
        codes: int32 in the tensor's shape (int64 for uint32): the integers themselves, or the
            bit patterns of floating-point elements.
        parameters: Their scales and zero points.
    """

    codes: Tensor
    parameters: Parameters


class Format(ABC):
    """A number format with its layout.

    Arithmetic is in float32, whatever the dtype of the tensor: bfloat16 and float16 are widened
    first and results rounded to the tensor's dtype last. A format that :attr:`covers` takes its
    scale from a range that may come from elsewhere, such as calibration; the others compute it
    from the tensor itself and know no static ranges.

    Attributes:
        number: Name and sizes of the format.
        layout: Which elements share a scale.
        scale_format: How a scale is stored.
        symmetric: Whether there is no zero point.
        rounding: How a value between two elements is rounded.
        spelling: The spec's text, axis and profile from which it was made, if it was.
    """

    covers: bool = False
    spelling: tuple[str, int | None, str] | None = None

    def __init__(
        self,
        number: NumberFormat,
        layout: Layout,
        scale_format: ScaleFormat = "float32",
        symmetric: bool = True,
        rounding: Rounding = "nearest_even",
    ) -> None:
        self.number = number
        self.layout = layout
        self.scale_format = scale_format
        self.symmetric = symmetric
        self.rounding: Rounding = rounding
        self.launches: dict[tuple[torch.Size, torch.dtype], Launch] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what belongs to this process."""
        return {**self.__dict__, "launches": {}}

    @property
    def signed_codes(self) -> bool:
        """Whether codes are integers with a sign; those of floats are bit patterns."""
        return self.number.signed and self.number.exponent is None

    @classmethod
    def parse(
        cls, text: str, role: Role = "weight", axis: int | None = None, *, profile: str = "ocp"
    ) -> Format:
        """The format that a recipe's shorthand means, such as ``mxfp4`` or ``int4/group:128``.

        Args:
            text: Shorthand of a :class:`~quark_core.spec.TensorSpec`, the format in any known
                spelling.
            role: Decides what is left open: weights are symmetric per channel, inputs
                asymmetric per tensor.
            axis: Axis of channels, groups or blocks; None is 0 for channels and -1 for groups.
            profile: Whose numerics to reproduce; see :mod:`quark_native.profiles`.

        Raises:
            ValueError: The text is no spec, or its parts contradict each other.
            UnsupportedSpecError: There is no such arithmetic here.
            UnknownNameError: There is no such profile.
        """
        from quark_native.formats import format_for

        spec = TensorSpec.model_validate(text).resolve(role)
        return format_for(spec, axis, profile=profile)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.number.name}, {self.layout})"

    # What a family implements.

    @abstractmethod
    def measure(self, x: Tensor) -> Parameters:
        """Scales (and zero points) that fit the tensor itself.

        A scale whose elements are not all finite is NaN, and so are all of them then.

        Args:
            x: float32 with at least one element.
        """

    @abstractmethod
    def limits(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Smallest and largest representable value under each scale, compact."""

    @abstractmethod
    def inside(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Whether each value is rounded to a representable one, not clipped to one."""

    # The arithmetic, split by the layout.

    @abstractmethod
    def _quantized(self, x: Tensor, parameters: Parameters, rounder: Rounder) -> Tensor:
        """What each value becomes."""

    @abstractmethod
    def _coded(self, x: Tensor, parameters: Parameters, rounder: Rounder) -> Tensor:
        """The code of what each value becomes."""

    @abstractmethod
    def _decoded(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """The value of each code; ``codes`` are not split."""

    # What some families change.

    def cover(self, low: Tensor, high: Tensor) -> Parameters:
        """Scales (and zero points) with which the range [low, high] is represented.

        Zero is always included, and exactly representable.

        Args:
            low: Smallest values, in the layout's compact shape.
            high: Largest values.

        Raises:
            TypeError: The format takes its scale from the tensor itself (not :attr:`covers`).
        """
        raise TypeError(f"{self.number.name} takes its scales from the tensor itself")

    def call(self) -> Call | None:
        """What a kernel needs to know of this format, or None if none computes it."""
        return None

    def outer_parameters(self, x: Tensor) -> Parameters | None:
        """What a kernel that finds the scales of blocks must be given beside x."""
        return None

    # The same for all.

    def fake_quantize(
        self,
        x: Tensor,
        parameters: Parameters | None = None,
        *,
        out: Tensor | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Each value replaced by one that the format can represent.

        The fastest kernel for the tensor computes it; see :mod:`quark_native.kernels`. Gradients
        pass straight through, and compilers see one operator; see :mod:`quark_native.ops`.

        Args:
            x: Floating point (float32, bfloat16, float16, float64), any shape and strides.
            parameters: Scales to use; None measures the tensor.
            out: Where to write: contiguous, shape and dtype of x; it may be x itself.
            seed: Of stochastic rounding.

        Returns:
            Shape and dtype of x. NaN stays NaN.

        Raises:
            TypeError: x is not floating point.
            ValueError: x has not the axis of the layout, or ``out`` does not fit.
        """
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            from quark_native import ops

            found = ops.fake_quantize(x, self, parameters, seed)
            return found if out is None else out.copy_(found)
        return dispatch.fake_quantize(self, x, parameters, out, seed)

    def specification(
        self, x: Tensor, parameters: Parameters | None = None, seed: int = 0
    ) -> Tensor:
        """:meth:`fake_quantize` in plain torch, in the order of the formulas."""
        self.layout.check(tuple(x.shape))
        if not x.numel():
            return x.clone()
        wide = x.to(self._dtype)
        parameters = parameters or self.measure(wide)
        rounder = self._rounder(tuple(x.shape), x.device, seed)
        quantized = self._quantized(wide, parameters, rounder)
        return self.layout.join(quantized, tuple(x.shape)).to(x.dtype)

    def encode(self, x: Tensor, parameters: Parameters | None = None, seed: int = 0) -> Encoded:
        """The codes of each value. ``decode(encode(x))`` equals ``fake_quantize(x)``.

        Args:
            x: Floating point; a NaN has a code only in formats with a NaN of their own, or as
                the scale of its block.
            parameters: Scales to use; None measures the tensor.
            seed: Of stochastic rounding.

        Raises:
            TypeError: x is not floating point.
            ValueError: x has not the axis of the layout.
        """
        require_floating(self.number.name, x)
        shape = tuple(x.shape)
        if not x.numel():
            scale = torch.ones(self.layout.compact_shape(shape), device=x.device)
            codes = torch.zeros(shape, dtype=torch.int32, device=x.device)
            return Encoded(codes, parameters or Parameters(scale))
        wide = x.to(self._dtype)
        parameters = parameters or self.measure(wide)
        rounder = self._rounder(shape, x.device, seed)
        codes = self._coded(wide, parameters, rounder)
        return Encoded(self.layout.join(codes, shape), parameters)

    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of codes."""
        shape = tuple(encoded.codes.shape)
        values = self._decoded(encoded.codes, encoded.parameters)
        return self.layout.join(values, shape).to(dtype)

    def quantize(self, x: Tensor, parameters: Parameters | None = None) -> PackedTensor:
        """Bit-packed codes of x with their scales; ``.dequantize()`` gives its values back.

        Args:
            x: Floating point, any shape and strides.
            parameters: Scales to use; None measures the tensor.
        """
        from quark_native.packed import PackedTensor

        return PackedTensor.quantize(self, x, parameters)

    def store(self, parameters: Parameters) -> dict[str, Tensor]:
        """Parameters as they are stored, by name; zero points as they are."""
        stored = {"scale": self.store_scale(parameters.scale)}
        if parameters.zero_point is not None:
            stored["zero_point"] = parameters.zero_point
        return stored

    def restore(self, stored: dict[str, Tensor], shape: tuple[int, ...]) -> Parameters:
        """Undo :meth:`store` for a tensor of ``shape``."""
        return Parameters(self.restore_scale(stored["scale"]), stored.get("zero_point"))

    def store_scale(self, scale: Tensor) -> Tensor:
        """A scale as it is stored: float32, or uint8 with the exponent of a power of two."""
        if self.scale_format not in ("e8m0", "power_of_two"):
            return scale
        exponent = exponent_of_power(scale) + EXPONENT_BIAS
        return torch.where(scale.isnan(), SCALE_NAN, exponent).to(torch.uint8)

    def restore_scale(self, stored: Tensor) -> Tensor:
        """Undo :meth:`store_scale`."""
        if self.scale_format not in ("e8m0", "power_of_two"):
            return stored
        scale = power_of_two(stored.to(torch.int32) - EXPONENT_BIAS)
        return torch.where(stored == SCALE_NAN, torch.nan, scale)

    @property
    def _dtype(self) -> torch.dtype:
        """Where the arithmetic takes place."""
        return torch.float32

    def _rounder(self, shape: tuple[int, ...], device: torch.device, seed: int) -> Rounder:
        if self.rounding != "stochastic":
            return Rounder(self.rounding)
        return Rounder("stochastic", self.layout.split(noise(shape, seed, device)))

    def _spread(self, parameters: Parameters, ndim: int) -> tuple[Tensor, Tensor | None]:
        zero_point = parameters.zero_point
        spread = None if zero_point is None else self.layout.spread(zero_point, ndim)
        return self.layout.spread(parameters.scale, ndim), spread


class ElementFormat(Format):
    """Values are elements times a scale: x' = (element(code) - zero_point) * scale."""

    @abstractmethod
    def _codes(self, elements: Tensor, zero_point: Tensor | None) -> Tensor:
        """Codes of what :meth:`_round` returned."""

    @abstractmethod
    def _elements(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        """Undo :meth:`_codes`."""

    @abstractmethod
    def _element_limits(self) -> tuple[float, float]:
        """Smallest and largest element."""

    def _within(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        """Whether each value divided by its scale is not clipped."""
        low, high = self._element_limits()
        shift = 0 if zero_point is None else zero_point
        return (scaled >= low - shift) & (scaled <= high - shift)

    def limits(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Smallest and largest representable value under each scale, compact."""
        low, high = self._element_limits()
        zero_point = 0 if parameters.zero_point is None else parameters.zero_point
        return (low - zero_point) * parameters.scale, (high - zero_point) * parameters.scale

    @property
    def element_limits(self) -> tuple[float, float]:
        """Smallest and largest element, in units of the scale."""
        return self._element_limits()

    def inside(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Whether each value is rounded to an element, not clipped to one."""
        scale, zero_point = self._spread(parameters, x.ndim)
        scaled = self.layout.split(x.to(self._dtype)) / scale
        return self.layout.join(self._within(scaled, zero_point), tuple(x.shape))

    def _decoded(self, codes: Tensor, parameters: Parameters) -> Tensor:
        scale, zero_point = self._spread(parameters, codes.ndim)
        return self._elements(self.layout.split(codes), zero_point) * scale


class GridFormat(ElementFormat):
    """A format that rounds x / scale to its elements."""

    @abstractmethod
    def _round(self, scaled: Tensor, zero_point: Tensor | None, rounder: Rounder) -> Tensor:
        """The element for each value divided by its scale, zero point left out."""

    def _quantized(self, x: Tensor, parameters: Parameters, rounder: Rounder) -> Tensor:
        scale, zero_point = self._spread(parameters, x.ndim)
        elements = self._round(rounder.divide(self.layout.split(x), scale), zero_point, rounder)
        return elements.mul_(scale)

    def _coded(self, x: Tensor, parameters: Parameters, rounder: Rounder) -> Tensor:
        scale, zero_point = self._spread(parameters, x.ndim)
        elements = self._round(rounder.divide(self.layout.split(x), scale), zero_point, rounder)
        return self._codes(elements, zero_point)


def require_floating(name: str, x: Tensor) -> None:
    """Refuse integers, booleans and complex numbers.

    Raises:
        TypeError: Names the format and the dtype.
    """
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} quantizes floating-point tensors, not {x.dtype}: convert it first")
