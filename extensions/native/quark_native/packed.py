"""PackedTensor: a quantized tensor as it is stored, usable without a model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quark_core.errors import QuantizationError
from quark_native.formats.base import Encoded, Format, Parameters, require_floating
from quark_native.kernels import dispatch
from quark_native.packing import pack, packed_bytes, unpack

_KEY = "quark_native.packed"


@dataclass(frozen=True)
class PackedTensor:
    """Bit-packed codes with their scales.

    Attributes:
        format: The format of the codes.
        shape: The shape of the values.
        codes: uint8, one axis: codes in the order of the elements, the first in the lowest bits.
        parts: Scales (and zero points) as :meth:`Format.store` makes them.
    """

    format: Format
    shape: tuple[int, ...]
    codes: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def quantize(cls, fmt: Format, x: Tensor, parameters: Parameters | None = None) -> PackedTensor:
        """Quantize and pack x; see :meth:`Format.quantize`."""
        require_floating(fmt.number.name, x)
        fmt.layout.check(tuple(x.shape))
        if not x.numel():
            return cls(fmt, tuple(x.shape), torch.empty(0, dtype=torch.uint8))
        packed = dispatch.pack(fmt, x) if parameters is None else None
        if packed is not None:
            return cls(fmt, tuple(x.shape), packed[0], {"scale": packed[1]})
        encoded = fmt.encode(x, parameters)
        codes = pack(encoded.codes, fmt.number.bits)
        return cls(fmt, tuple(x.shape), codes, fmt.store(encoded.parameters))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, in the shape of the tensor that was quantized."""
        fmt, count = self.format, math.prod(self.shape)
        if not count:
            return torch.empty(self.shape, dtype=dtype)
        self._check(count)
        if "scale" in self.parts:
            found = dispatch.unpack(fmt, self.shape, self.codes, self.parts["scale"], dtype)
            if found is not None:
                return found
        codes = unpack(self.codes, fmt.number.bits, count, signed=fmt.signed_codes)
        codes = codes.reshape(self.shape)
        return fmt.decode(Encoded(codes, fmt.restore(self.parts, self.shape)), dtype)

    def _check(self, count: int) -> None:
        """Kernels read as many bytes as the shape says: they must be there."""
        fmt, wanted = self.format, packed_bytes(count, self.format.number.bits)
        scales = self.parts.get("scale")
        whole = self.codes.dtype == torch.uint8 and self.codes.numel() == wanted
        if whole and scales is not None and scales.dtype == torch.uint8 and fmt.number.block:
            # One a block; formats with more than one scale for each have their own shapes.
            exact = fmt.layout.size == fmt.number.block
            needed = math.prod(fmt.layout.compact_shape(self.shape))
            whole = not exact or scales.numel() == needed
        if not whole:
            raise QuantizationError(
                f"the packed tensor of shape {list(self.shape)} has not the codes and scales that "
                f"{fmt.number.name} needs for it",
                fix="Quantize it again",
            )

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(part.nbytes for part in (self.codes, *self.parts.values()))

    def save(self, file: Path | str) -> None:
        """Write a safetensors file; its metadata hold the format and the shape."""
        if self.format.spelling is None:
            raise QuantizationError(
                "a format that was not made from a spec cannot be saved",
                fix="Make it by Format.parse",
            )
        text, axis, profile = self.format.spelling
        described = {"spec": text, "axis": axis, "profile": profile, "shape": self.shape}
        tensors = {"codes": self.codes, **self.parts}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, file, metadata={_KEY: json.dumps(described)})

    @classmethod
    def load(cls, file: Path | str) -> PackedTensor:
        """Read what :meth:`save` wrote.

        Raises:
            QuantizationError: The file is missing, damaged or holds something else.
        """
        fix = "Write it by PackedTensor.save"
        try:
            with safe_open(file, "pt") as stored:
                described = json.loads((stored.metadata() or {})[_KEY])
                parts = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            axis, profile = described["axis"], described["profile"]
            fmt = Format.parse(described["spec"], role="output", axis=axis, profile=profile)
            return cls(fmt, tuple(described["shape"]), parts.pop("codes"), parts)
        except FileNotFoundError:
            raise QuantizationError("there is no such file", where=str(file), fix=fix) from None
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise QuantizationError(
                "the file holds no packed tensor", where=str(file), cause=str(error), fix=fix
            ) from None
