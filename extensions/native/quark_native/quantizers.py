"""What quantized modules are made of: fake quantization of activations, packed constants."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quark_core.errors import QuantizationError
from quark_core.spec import TensorSpec
from quark_native.encodings import Observer, observer_for
from quark_native.formats import Encoded, Format, Parameters
from quark_native.ops import fake_quantize
from quark_native.packing import pack, unpack


def random_seed() -> int:
    """A seed for stochastic rounding from torch's generator, so that torch.manual_seed decides."""
    return int(torch.randint(1 << 62, ()))


class Parameterized(nn.Module):
    """A module that owns the scales and zero points of a format.

    They keep their dtypes when the model is cast to another one: the codes mean nothing without
    the exact scale. All are buffers as :class:`~quark_native.formats.Parameters` has them, None
    until known.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    outer: Tensor | None

    def __init__(self, fmt: Format) -> None:
        super().__init__()
        self.format = fmt
        for name in ("scale", "zero_point", "outer"):
            self.register_buffer(name, None)
        self._known: Parameters | None = None

    @property
    def known_parameters(self) -> Parameters | None:
        """The scales and zero points, or None where each tensor is measured anew."""
        known, scale = self._known, self.scale
        if known is None or known.scale is not scale:
            known = None if scale is None else Parameters(scale, self.zero_point, self.outer)
            self._known = known
        return known

    def take(self, parameters: Parameters) -> None:
        """Use these scales and zero points from here on."""
        self.scale, self.zero_point = parameters.scale, parameters.zero_point
        self.outer = parameters.outer

    def stored(self) -> dict[str, Tensor]:
        """The tensors as they are stored: powers of two as exponents, zero points packed."""
        known = self.known_parameters
        if known is None:
            return {}
        found = self.format.store(known)
        if "zero_point" in found:
            found["zero_point"] = pack(found["zero_point"], self.format.number.bits)
        return found

    def restore(self, stored: dict[str, Tensor], shape: tuple[int, ...] = ()) -> None:
        """Undo :meth:`stored` for a tensor of ``shape``; activations have scales of any shape."""
        if "zero_point" in stored:
            number, count = self.format.number, stored["scale"].numel()
            points = unpack(stored["zero_point"], number.bits, count, signed=number.signed)
            stored = {**stored, "zero_point": points.reshape(stored["scale"].shape)}
        self.take(self.format.restore(stored, shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class TensorQuantizer(Parameterized):
    """Fake-quantizes an input or output of a layer.

    It passes values through unchanged until it is ready; a static one observes them meanwhile,
    and :meth:`freeze` fixes its scale. Others measure each tensor anew.

    Args:
        spec: The resolved spec.
        fmt: Its arithmetic.
        where: The tensor's name, for messages.
    """

    def __init__(self, spec: TensorSpec, fmt: Format, where: str) -> None:
        super().__init__(fmt)
        self.where = where
        self.ready = False
        self.observer: Observer | None = None
        if fmt.covers and not spec.dynamic:
            self.observer = observer_for(spec.observer, fmt, stream=True)

    def freeze(self) -> None:
        """Fix the scale by what was observed, and quantize from here on.

        Raises:
            QuantizationError: Nothing was observed, or values that are not finite.
        """
        if self.observer is not None:
            try:
                parameters = self.observer.scale_zero_point()
            except QuantizationError as error:
                where = f"tensor {self.where!r}"
                raise QuantizationError(error.what, where=where, fix=error.fix) from None
            self.take(parameters)
        self.observer, self.ready = None, True

    def restore(self, stored: dict[str, Tensor], shape: tuple[int, ...] = ()) -> None:
        """Take over stored scales, and quantize from here on."""
        if stored:
            super().restore(stored, shape)
        self.observer, self.ready = None, True

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize x; until ready, return it unchanged.

        Raises:
            QuantizationError: x has not the axis that the spec asks for.
        """
        try:
            if self.observer is not None:
                self.observer.observe(x.detach())
            if not self.ready:
                return x
            seed = random_seed() if self.format.rounding == "stochastic" else 0
            return fake_quantize(x, self.format, self.known_parameters, seed)
        except ValueError as error:
            raise QuantizationError(
                str(error),
                where=f"tensor {self.where!r}",
                fix="Choose another granularity for it by a rule",
            ) from None


class PackedParameter(Parameterized):
    """A constant (weight or bias) as packed codes with their scales.

    Args:
        fmt: The format of the codes.
        shape: The constant's shape.
    """

    codes: Tensor

    def __init__(self, fmt: Format, shape: tuple[int, ...]) -> None:
        super().__init__(fmt)
        self.shape = shape
        self.register_buffer("codes", torch.empty(0, dtype=torch.uint8))

    @classmethod
    def of(cls, encoded: Encoded, fmt: Format) -> PackedParameter:
        """Pack an encoded tensor."""
        packed = cls(fmt, tuple(encoded.codes.shape))
        packed.codes = pack(encoded.codes, fmt.number.bits)
        packed.take(encoded.parameters)
        return packed

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The values."""
        count = math.prod(self.shape)
        bits, parameters = self.format.number.bits, self.known_parameters
        codes = unpack(self.codes, bits, count, signed=self.format.signed_codes)
        assert parameters is not None
        return self.format.decode(Encoded(codes.reshape(self.shape), parameters), dtype)

    def stored(self) -> dict[str, Tensor]:
        """The tensors as they are stored."""
        return {"codes": self.codes, **super().stored()}

    def restore(self, stored: dict[str, Tensor], shape: tuple[int, ...] = ()) -> None:
        """Undo :meth:`stored`."""
        self.codes = stored["codes"]
        super().restore(stored, shape or self.shape)
