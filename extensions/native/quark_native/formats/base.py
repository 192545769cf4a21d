"""Format: the common interface of all number formats.

Every format here represents a value as

    x' = (element(code) - zero_point) * scale

where the layout says which elements share a scale. A format is therefore a rule that finds the
scale (:meth:`Format.measure`, :meth:`Format.cover`) and a set of elements with a rounding to the
nearest of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quark_core.formats import NumberFormat
from quark_core.spec import Role, ScaleFormat, TensorSpec
from quark_native.formats.bits import EXPONENT_BIAS, exponent_of_power, power_of_two
from quark_native.formats.layout import Layout

SCALE_NAN = 255
"""The stored exponent that means NaN; E8M0 in OCP Microscaling Formats 1.0, section 5.4.1."""


@dataclass(frozen=True)
class Parameters:
    """What a scale's elements share.

    Attributes:
        scale: float32, one value a scale in the layout's compact shape.
        zero_point: int32 like ``scale``, or None where zero is the middle.
    """

    scale: Tensor
    zero_point: Tensor | None = None


@dataclass(frozen=True)
class Encoded:
    """A tensor in codes.

    Attributes:
        codes: int32 in the tensor's shape: the integers themselves, or the bit patterns of
            floating-point elements.
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
    """

    covers: ClassVar[bool] = False

    def __init__(
        self,
        number: NumberFormat,
        layout: Layout,
        scale_format: ScaleFormat = "float32",
        symmetric: bool = True,
    ) -> None:
        self.number = number
        self.layout = layout
        self.scale_format = scale_format
        self.symmetric = symmetric

    @property
    def signed_codes(self) -> bool:
        """Whether codes are integers with a sign; those of floats are bit patterns."""
        return self.number.signed and self.number.exponent is None

    @classmethod
    def parse(cls, text: str, role: Role = "weight", axis: int | None = None) -> Format:
        """The format that a recipe's shorthand means, such as ``mxfp4`` or ``int4/group:128``.

        Args:
            text: Shorthand of a :class:`~quark_core.spec.TensorSpec`.
            role: Decides what is left open: weights are symmetric per channel, inputs
                asymmetric per tensor.
            axis: Axis of channels or groups; None is 0 for channels and -1 for groups.

        Raises:
            ValueError: The text is no spec, or its parts contradict each other.
            UnsupportedSpecError: There is no such arithmetic here.
        """
        from quark_native.formats import format_for

        return format_for(TensorSpec.model_validate(text).resolve(role), axis)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.number.name}, {self.layout})"

    # What a family implements.

    @abstractmethod
    def measure(self, x: Tensor) -> Parameters:
        """Scales (and zero points) that fit the tensor itself.

        A scale whose elements are not all finite is NaN, and so are all of them then.
        """

    @abstractmethod
    def _nearest(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        """The nearest element of each value divided by its scale, zero point left out."""

    @abstractmethod
    def _codes(self, elements: Tensor, zero_point: Tensor | None) -> Tensor:
        """int32 codes of what :meth:`_nearest` returned."""

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

    # The same for all.

    def fake_quantize(self, x: Tensor, parameters: Parameters | None = None) -> Tensor:
        """Each value replaced by the nearest one that the format can represent.

        Args:
            x: Floating point, any shape and strides.
            parameters: Scales to use; None measures the tensor.

        Returns:
            Shape and dtype of x. NaN stays NaN.
        """
        if not x.numel():
            return x.clone()
        wide = x.to(torch.float32)
        scale, zero_point = self._spread(parameters or self.measure(wide), x.ndim)
        scaled = self.layout.split(wide) / scale
        quantized = self._nearest(scaled, zero_point).mul_(scale)
        return self.layout.join(quantized, tuple(x.shape)).to(x.dtype)

    def encode(self, x: Tensor, parameters: Parameters | None = None) -> Encoded:
        """The codes of each value. ``decode(encode(x))`` equals ``fake_quantize(x)``.

        Args:
            x: Floating point; a NaN has a code only in formats with a NaN of their own, or as
                the scale of its block.
            parameters: Scales to use; None measures the tensor.
        """
        wide = x.to(torch.float32)
        parameters = parameters or self.measure(wide)
        scale, zero_point = self._spread(parameters, x.ndim)
        elements = self._nearest(self.layout.split(wide) / scale, zero_point)
        codes = self.layout.join(self._codes(elements, zero_point), tuple(x.shape))
        return Encoded(codes, parameters)

    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of codes."""
        scale, zero_point = self._spread(encoded.parameters, encoded.codes.ndim)
        elements = self._elements(self.layout.split(encoded.codes), zero_point)
        return self.layout.join(elements * scale, tuple(encoded.codes.shape)).to(dtype)

    def limits(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Smallest and largest representable value under each scale, compact."""
        low, high = self._element_limits()
        zero_point = 0 if parameters.zero_point is None else parameters.zero_point
        return (low - zero_point) * parameters.scale, (high - zero_point) * parameters.scale

    def inside(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Whether each value is rounded to an element, not clipped to one."""
        scale, zero_point = self._spread(parameters, x.ndim)
        scaled = self.layout.split(x.to(torch.float32)) / scale
        return self.layout.join(self._within(scaled, zero_point), tuple(x.shape))

    def store_scale(self, scale: Tensor) -> Tensor:
        """A scale as it is stored: float32, or uint8 with the exponent of a power of two."""
        if self.scale_format == "float32":
            return scale
        exponent = exponent_of_power(scale) + EXPONENT_BIAS
        return torch.where(scale.isnan(), SCALE_NAN, exponent).to(torch.uint8)

    def restore_scale(self, stored: Tensor) -> Tensor:
        """Undo :meth:`store_scale`."""
        if self.scale_format == "float32":
            return stored
        scale = power_of_two(stored.to(torch.int32) - EXPONENT_BIAS)
        return torch.where(stored == SCALE_NAN, torch.nan, scale)

    def _spread(self, parameters: Parameters, ndim: int) -> tuple[Tensor, Tensor | None]:
        zero_point = parameters.zero_point
        spread = None if zero_point is None else self.layout.spread(zero_point, ndim)
        return self.layout.spread(parameters.scale, ndim), spread
