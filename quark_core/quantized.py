"""QuantizedModel: what a backend returns, with one uniform view of its numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quark_core.errors import ExportError, QuantizationError
from quark_core.formats import parse_format
from quark_core.plan import Plan
from quark_core.spec import Role

if TYPE_CHECKING:
    import torch

    from quark_core.batch import Batch

_SCALE_BITS = {"float32": 32, "power_of_two": 8, "e8m0": 8, "fp8_e4m3": 8}


@dataclass(frozen=True)
class Encoding:
    """The numbers of one quantized tensor: real value = (code - zero_point) * scale.

    Attributes:
        tensor: Dotted name: ``conv1.weight``, ``conv1.input``, ``conv1.output``.
        layer: The plan entry it belongs to.
        role: Which tensor of the layer it is.
        format: Canonical name of the number format.
        granularity: As a recipe spells it.
        axis: Axis of the channels or blocks, if there is one.
        symmetric: Whether the zero point is fixed at zero.
        dynamic: Whether the scale is computed from each input; then the tensors are None.
        scale: Float tensor; a scalar, one a channel, or one a block.
        zero_point: Tensor like ``scale``: integers, or floats where the backend leaves them
            unrounded; None where the format has none.
        min, max: Smallest and largest representable value, float tensors like ``scale``.
        scale_format: Number format in which a scale is stored.
    """

    tensor: str
    layer: str
    role: Role
    format: str
    granularity: str
    axis: int | None = None
    symmetric: bool = True
    dynamic: bool = False
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    min: torch.Tensor | None = None
    max: torch.Tensor | None = None
    scale_format: str = "float32"

    def parameter_bytes(self) -> int:
        """Bytes that the scales and zero points take when stored."""
        if self.scale is None:
            return 0
        count = self.scale.numel()
        bits = count * _SCALE_BITS.get(self.scale_format, 32)
        if not self.symmetric:
            unrounded = self.zero_point is not None and self.zero_point.is_floating_point()
            bits += count * (32 if unrounded else parse_format(self.format).bits)
        return ceil(bits / 8)


class QuantizedModel(ABC):
    """A quantized model, callable like the float one.

    A backend implements :meth:`encodings`, and overrides what else it can do.

    Attributes:
        module: The quantized module.
        plan: The plan that was carried out.
        float_tensors: Shape and bytes an element of each parameter and buffer of the float
            model, tied ones once; the host fills it in.
        notes: What is worth knowing of how it was made, a sentence each; runs show them.
        example: One batch the model was made or loaded with, for exports that must trace; None
            where there were no data.
        float_model: The float model, and
        evaluation: the evaluation batches, for exports that check what they write on real data;
            None outside of a run.
    """

    def __init__(self, module: torch.nn.Module, plan: Plan) -> None:
        self.module = module
        self.plan = plan
        self.float_tensors: Mapping[str, tuple[tuple[int, ...], int]] = {}
        self.notes: list[str] = []
        self.example: Batch | None = None
        self.float_model: torch.nn.Module | None = None
        self.evaluation: Iterable[Any] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let users give places as text: backends get a Path whose folder is there."""
        super().__init_subclass__(**kwargs)
        if "save" in vars(cls):
            setattr(cls, "save", _into_folder(vars(cls)["save"]))  # noqa: B010
        if "export" in vars(cls):
            setattr(cls, "export", _into_file(vars(cls)["export"]))  # noqa: B010

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the quantized module."""
        return self.module(*args, **kwargs)

    @abstractmethod
    def encodings(self) -> Sequence[Encoding]:
        """One entry for each quantized tensor."""

    def layer(self, name: str) -> torch.nn.Module | None:
        """The module that stands where the float layer ``name`` stood, or None.

        Per-layer analysis listens to its output; a backend that renames modules overrides this.
        """
        try:
            return self.module.get_submodule(name)
        except AttributeError:
            return None

    def counterpart(self, name: str) -> str | None:
        """The float model's module whose output the quantized layer ``name`` stands for.

        The layer of the same name, unless the backend folded what follows into it: then the
        last module folded. None where no module of the float model computes the same.
        """
        return name

    def storage(self) -> dict[str, int]:
        """Packed bytes of each stored tensor, scales and zero points included.

        Weights and biases with an encoding count at their format's bits, all others as in the
        float model. A backend that folds or splits tensors overrides this.
        """
        return packed_sizes(self.float_tensors, self.encodings())

    def size_bytes(self) -> int:
        """Bytes of the model when every tensor is stored packed in its format."""
        return sum(self.storage().values())

    def save(self, directory: Path) -> None:
        """Write what :meth:`ModelQuantizer.load` needs; safetensors and JSON, never pickle.

        Raises:
            ExportError: The backend cannot save its models.
        """
        raise ExportError(
            f"{type(self).__name__} cannot be saved", fix="`quark info` lists what a backend can do"
        )

    def export(self, name: str, path: Path) -> Path:
        """Write the model in the backend's own format ``name``; returns the path written.

        Raises:
            ExportError: The backend has no such format, or this model does not fit it.
        """
        raise ExportError(
            f"{type(self).__name__} has no export format {name!r}",
            fix="`quark info` lists what a backend can do",
        )

    def set_enabled(self, layer: str, enabled: bool) -> None:
        """Switch the quantization of one layer off (float arithmetic) or on again.

        Raises:
            QuantizationError: The backend cannot, or knows no such layer.
        """
        raise QuantizationError(
            f"{type(self).__name__} cannot switch layers", where=f"layer {layer!r}"
        )


def _into_folder(save: Callable[[Any, Path], None]) -> Callable[[Any, Path], None]:
    @wraps(save)
    def saved(self: Any, directory: Path) -> None:
        place = Path(directory)
        place.mkdir(parents=True, exist_ok=True)
        save(self, place)

    return saved


def _into_file(export: Callable[[Any, str, Path], Path]) -> Callable[[Any, str, Path], Path]:
    @wraps(export)
    def exported(self: Any, name: str, path: Path) -> Path:
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        return export(self, name, place)

    return exported


def packed_sizes(
    tensors: Mapping[str, tuple[tuple[int, ...], int]], encodings: Sequence[Encoding]
) -> dict[str, int]:
    """Bytes of each stored tensor when those with an encoding are packed in its format.

    Args:
        tensors: Shape and bytes an element of each tensor, by name.
        encodings: The encodings; one whose tensor is not stored (an activation) counts for its
            scales and zero points.
    """
    left = {encoding.tensor: encoding for encoding in encodings}
    sizes = {}
    for name, (shape, itemsize) in tensors.items():
        encoding = left.pop(name, None)
        sizes[name] = _elements(shape) * itemsize if encoding is None else _packed(encoding, shape)
    return sizes | {name: encoding.parameter_bytes() for name, encoding in left.items()}


def _packed(encoding: Encoding, shape: tuple[int, ...]) -> int:
    fmt = parse_format(encoding.format)
    if fmt.is_block:
        return fmt.packed_bytes(shape, -1 if encoding.axis is None else encoding.axis)
    return ceil(_elements(shape) * fmt.bits / 8) + encoding.parameter_bytes()


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
