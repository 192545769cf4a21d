"""Regions of a model whose input channels can be scaled with nothing left to do at run time.

A norm, or a Linear layer, and the Linear layers that read what it writes: its output channels are
divided by factors, their columns multiplied by the same. Which layers those are is found on a
graph recorded from one call. The numbers of the source's channels are sent through the operations
in between as values would be, reshaped, transposed and repeated, which tells for each column of a
layer the channel it reads: so heads of attention that share keys and values are followed too.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from quark_brevitas.graphs import SHAPE, plain_norms, record
from quark_brevitas.wrappers import inner
from quark_core.batch import Batch
from quark_core.errors import QuantizationError

_PASSED = (nn.Identity, nn.Dropout, nn.ReLU, nn.LeakyReLU)
"""Modules that a positive factor passes, in eval mode."""
_SAME = {"to", "float", "contiguous", "clone", "detach", "dropout", "relu", "leaky_relu"}
_SHAPING = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "getitem"),
    *("transpose", "permute", "movedim", "swapaxes", "expand", "repeat", "repeat_interleave"),
}
_PRODUCTS = {"mul", "multiply", "mul_", "__mul__", "__rmul__", "__imul__"}
_QUOTIENTS = {"div", "true_divide", "div_", "__truediv__", "__itruediv__"}
_MATRIX_PRODUCTS = {"matmul", "bmm", "__matmul__"}


@dataclass(frozen=True)
class Region:
    """Layers that share factors.

    Attributes:
        source: Name of the norm or Linear layer that writes; empty where nothing before the
            layers can take over factors.
        width: Channels it writes.
        sinks: By name of a Linear layer that reads, the channel each of its columns reads.
    """

    source: str
    width: int
    sinks: Mapping[str, Tensor]


def regions(model: nn.Module, example: Batch, quantized: Iterable[str]) -> list[Region]:
    """The regions with at least one layer that will be quantized, in order of execution.

    Args:
        model: The float model.
        example: One batch on its device.
        quantized: Names of the layers that will be quantized.
    """
    wanted, found = set(quantized), []
    with plain_norms(model):
        graph = record(model, example).graph
        modules = dict(model.named_modules())
        calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        once = {str(name): modules[str(name)] for name, times in calls.items() if times == 1}
        for node in graph.nodes:
            width = _width(once.get(str(node.target))) if node.op == "call_module" else 0
            sinks = _sinks(node, width, once) if width else None
            if sinks and wanted & sinks.keys():
                found.append(Region(str(node.target), width, sinks))
    return found


def required(
    model: nn.Module, example: Batch, quantized: Iterable[str], where: str
) -> list[Region]:
    """The regions, of which there must be one.

    Args:
        model: The float model.
        example: One batch on its device.
        quantized: Names of the layers that will be quantized.
        where: The option that asks for them.

    Raises:
        QuantizationError: There is none.
    """
    found = regions(model, example, quantized)
    if not found:
        raise QuantizationError(
            "no norm or Linear layer is followed by quantized Linear layers alone, so nothing can "
            "take over the factors",
            where=where,
            fix=f"Write {where}: layerwise",
        )
    return found


def alone(name: str, layer: nn.Linear) -> Region:
    """A layer whose factor has to stay before it."""
    return Region("", layer.in_features, {name: torch.arange(layer.in_features)})


def members(found: Iterable[Region]) -> list[str]:
    """Names of all layers whose input or output changes with factors, sources among them."""
    return [name for region in found for name in (region.source, *region.sinks)]


def fold(model: nn.Module, region: Region, factor: Tensor) -> None:
    """Divide what the source writes by a factor [width], and multiply the columns that read it."""
    if region.source:
        source = inner(model.get_submodule(region.source))
        weight = source.get_parameter("weight")
        divisor = factor.to(weight)
        rows = divisor[:, None] if weight.ndim == 2 else divisor
        source.weight = nn.Parameter(weight.detach() / rows, weight.requires_grad)
        bias = getattr(source, "bias", None)
        if bias is not None:
            source.bias = nn.Parameter(bias.detach() / divisor, bias.requires_grad)
    for name, channels in region.sinks.items():
        layer = inner(model.get_submodule(name))
        weight = layer.get_parameter("weight")
        scaled = weight.detach() * factor.to(weight)[channels]
        layer.weight = nn.Parameter(scaled, weight.requires_grad)


def per_channel(region: Region, columns: Mapping[str, Tensor]) -> Tensor:
    """The largest of the values [inputs] of sinks for each channel [width] of the source."""
    found = torch.zeros(region.width)
    for name, values in columns.items():
        channels = region.sinks[name]
        found = found.scatter_reduce(0, channels, values.detach().float().cpu(), "amax")
    return found


def _width(module: nn.Module | None) -> int:
    """Channels a module writes that can be divided, or 0."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        single = len(module.normalized_shape) == 1
        return module.normalized_shape[0] if single and module.elementwise_affine else 0
    return module.out_features if type(module) is nn.Linear else 0


def _sinks(source: fx.Node, width: int, once: Mapping[str, nn.Module]) -> dict[str, Tensor] | None:
    """The layers that alone read a source; None where anything else does."""
    channels = torch.arange(width).expand(source.meta[SHAPE])
    sinks: dict[str, Tensor] = {}
    seen: set[fx.Node] = set()
    waiting = [(user, source, channels) for user in source.users]
    while waiting:
        node, origin, channels = waiting.pop()
        if node in seen or _mentions(node, origin) != 1:
            return None
        seen.add(node)
        module = once.get(str(node.target)) if node.op == "call_module" else None
        if type(module) is nn.Linear:
            rows = channels.reshape(-1, channels.shape[-1])
            if not bool((rows == rows[0]).all()):
                return None
            sinks[str(node.target)] = rows[0].clone()
            continue
        passed = _through(node, origin, channels, module)
        if passed is None or tuple(passed.shape) != node.meta.get(SHAPE):
            return None
        waiting += [(user, node, passed) for user in node.users]
    return sinks


def _mentions(node: fx.Node, origin: fx.Node) -> int:
    """How often a node reads the output of another."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return sum(one is origin for one in found)


def _through(
    node: fx.Node, origin: fx.Node, channels: Tensor, module: nn.Module | None
) -> Tensor | None:
    """Where channels are after an operation; None if it does more than scale and move them."""
    if node.op == "call_module":
        return channels if isinstance(module, _PASSED) else None
    if node.op == "output":
        return None
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    shape = node.meta.get(SHAPE)
    return None if shape is None else _passed(name, node, origin, channels, shape)


def _passed(
    name: str, node: fx.Node, origin: fx.Node, channels: Tensor, shape: tuple[int, ...]
) -> Tensor | None:
    """The same for a function, or a method of tensors, by its name."""
    first, second, third = (*node.args, None, None, None)[:3]
    found = None
    if name in _SAME and first is origin:
        found = channels
    elif name in _SHAPING and first is origin:
        found = _shaped(name, node, channels)
    elif name in _PRODUCTS or (name in _QUOTIENTS and first is origin):
        found = channels.broadcast_to(shape)
    elif name == "scaled_dot_product_attention":
        value = node.kwargs.get("value", third)
        found = _mixed(channels, shape) if value is origin else None
    elif name in _MATRIX_PRODUCTS and second is origin:
        found = _mixed(channels, shape)
    elif name == "cat" and isinstance(first, tuple | list):
        # A cache that is empty yet.
        others = [one for one in first if one is not origin]
        empty = all(isinstance(one, fx.Node) and 0 in one.meta.get(SHAPE, ()) for one in others)
        found = channels if empty else None
    return found


def _shaped(name: str, node: fx.Node, channels: Tensor) -> Tensor | None:
    rest = (node.args[1:], node.kwargs)
    others: list[fx.Node] = []
    fx.node.map_arg(rest, others.append)
    if others:
        return None
    change: Any = operator.getitem if name == "getitem" else getattr(torch.Tensor, name)
    try:
        moved: Tensor = change(channels, *node.args[1:], **node.kwargs)
    except (RuntimeError, TypeError, IndexError):
        return None  # the call had arguments that a graph cannot hold
    return moved


def _mixed(channels: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Channels after sums over the axis before the last, of whole heads."""
    if channels.ndim < 2 or not bool((channels == channels[..., :1, :]).all()):
        return None
    one = channels[..., :1, :]
    if len(shape) >= 3 and one.ndim >= 3 and one.shape[-3] not in (1, shape[-3]):
        if shape[-3] % one.shape[-3]:
            return None
        one = one.repeat_interleave(shape[-3] // one.shape[-3], -3)
    try:
        return one.broadcast_to(shape)
    except RuntimeError:
        return None
