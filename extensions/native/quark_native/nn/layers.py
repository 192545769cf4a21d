"""The layers that can be quantized, and where their channels lie."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from quark_core.spec import Role, TensorSpec
from quark_native.formats import Format, format_for
from quark_native.nn.layer import QuantizedLayer


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """A quantized :class:`torch.nn.Linear`."""


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    """A quantized :class:`torch.nn.Conv1d`."""


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """A quantized :class:`torch.nn.Conv2d`."""


class QuantizedConvTranspose1d(QuantizedLayer, nn.ConvTranspose1d):
    """A quantized :class:`torch.nn.ConvTranspose1d`."""


class QuantizedConvTranspose2d(QuantizedLayer, nn.ConvTranspose2d):
    """A quantized :class:`torch.nn.ConvTranspose2d`."""


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """A quantized :class:`torch.nn.Embedding`."""


OPS: dict[type, str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.Embedding: "embedding",
}
"""Operation by class, as rules and plans name it."""


@dataclass(frozen=True)
class _Axes:
    """Where a layer's channels are.

    Attributes:
        outputs: Axis of the weight's output channels (an embedding's entries).
        inputs: Axis of the weight's input channels (an embedding's features).
        features: Axis of the channels in inputs and outputs, batched or not.
    """

    outputs: int
    inputs: int
    features: int


_AXES = {
    "linear": _Axes(0, 1, -1),
    "conv1d": _Axes(0, 1, -2),
    "conv2d": _Axes(0, 1, -3),
    # Weights are [inputs, outputs / groups, ...]; with groups, the n-th output channels of all
    # groups share a scale.
    "conv_transpose1d": _Axes(1, 0, -2),
    "conv_transpose2d": _Axes(1, 0, -3),
    "embedding": _Axes(0, 1, -1),
}


def layer_format(op: str, role: Role, spec: TensorSpec) -> Format:
    """The arithmetic of one tensor of a layer; channels and groups run along the layer's own axes.

    Args:
        op: A value of :data:`OPS`.
        role: Which tensor.
        spec: Its resolved spec.

    Raises:
        UnsupportedSpecError: There is no such arithmetic.
    """
    axes = _AXES[op]
    channel = spec.granularity is not None and spec.granularity.kind == "channel"
    if role == "weight":
        return format_for(spec, axes.outputs if channel else axes.inputs)
    return format_for(spec, 0 if role == "bias" else axes.features)


_QUANTIZED: dict[type, type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.Embedding: QuantizedEmbedding,
}


def quantized_class(cls: type[nn.Module]) -> type[QuantizedLayer]:
    """The quantized counterpart of a layer class.

    A subclass of a known layer keeps its own forward: it gets a counterpart made from itself,
    once.
    """
    if cls not in _QUANTIZED:
        about = {"__module__": cls.__module__, "__doc__": f"A quantized {cls.__qualname__}."}
        _QUANTIZED[cls] = type(f"Quantized{cls.__name__}", (QuantizedLayer, cls), about)
    return _QUANTIZED[cls]
