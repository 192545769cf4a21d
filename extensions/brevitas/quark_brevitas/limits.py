"""What Brevitas cannot do to a layer of a given shape, and what a user should know beforehand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from math import prod
from typing import Any

import torch
from torch import nn

from quark_brevitas import preparation
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.options import LearnedRound, accumulator_of
from quark_core.batch import Batch
from quark_core.errors import QuantizationError
from quark_core.plan import PlanEntry

# One step of Brevitas's search runs the weight through its quantizer once: overhead, and time an
# element, measured on one core. It makes at most a thousand steps.
_HQO_STEPS = 1000
_HQO_SECONDS_A_STEP = 2e-3
_HQO_SECONDS_AN_ELEMENT = 2e-6
_WORTH_A_WARNING = 10.0
_HOLDERS = (nn.ModuleList, nn.Sequential)


def require_whole(model: nn.Module) -> None:
    """Refuse a model of which no layer can be replaced.

    Raises:
        QuantizationError: It is a layer itself, or was compiled.
    """
    if hasattr(model, "_orig_mod"):
        raise QuantizationError(
            "torch.compile has wrapped the model, and would compile it anew after each pass",
            where="model",
            fix="Quantize the model first, and compile what comes of it",
        )
    if type(model) in preparation.OPS:
        raise QuantizationError(
            "the model is itself the layer that Brevitas should replace within it",
            where="model",
            fix="Wrap it in torch.nn.Sequential",
        )


def require(model: nn.Module, entries: Iterable[PlanEntry], config: BrevitasConfig) -> None:
    """Refuse what only the model's layers show to be impossible.

    Raises:
        QuantizationError: Names the layer, the reason and the nearest choice.
    """
    planned = [entry for entry in entries if entry.weight is not None]
    for entry in planned:
        layer = model.get_submodule(entry.name)
        _require_numbers(entry, layer)
        if not config.pad_groups:
            _require_whole_groups(entry)
        _require_search(entry, config)
        _require_register(entry, config)
        _require_channels(entry, layer)
        _require_padding(entry, layer)
        _require_bias(entry, layer)
    if config.calibrate_bn and not preparation.has_batch_norm(model):
        raise QuantizationError(
            "calibrate_bn: the model has no BatchNorm",
            where="plan",
            fix="Write calibrate_bn: false",
        )
    if config.rotation is not None and all(entry.op != "linear" for entry in planned):
        raise QuantizationError(
            "rotation turns the inputs of Linear layers, and none is quantized",
            where="plan",
            fix="Leave rotation out",
        )
    if config.rotation is not None and config.rotation.block_size is not None:
        _require_blocks_fit(planned, config.rotation.block_size)
    if isinstance(config.algorithm, LearnedRound) and config.algorithm.blocks is not None:
        _require_blocks(model, planned, config.algorithm.blocks)
    if config.awq is not None and all(entry.op != "linear" for entry in planned):
        raise QuantizationError(
            "awq is for Linear layers, and none is quantized", where="plan", fix="Leave awq out"
        )
    if config.low_rank is not None:
        _require_rest(planned, config.low_rank.rank)
    if config.algorithm is not None and planned and not any(map(preparation.is_roundable, planned)):
        raise QuantizationError(
            f"{config.algorithm.name} rounds Linear and Conv layers, and only transposed "
            "convolutions or embeddings are quantized",
            where="plan",
            fix="Leave algorithm out",
        )


def require_running(model: nn.Module, example: Batch) -> None:
    """Refuse a rewritten graph that does not run: not every module takes Brevitas's tensors.

    Raises:
        QuantizationError: Tells what the model's code said.
    """
    try:
        example.first().run(model)
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise QuantizationError(
            "the model does not run on the quantized tensors that fx puts between its layers",
            where="backend: fx",
            cause=f"{type(error).__name__}: {lines[0] if lines else ''}",
            fix="Write backend: layerwise",
        ) from error


def require_single_calls(graph: Any) -> None:
    """Refuse layers that a traced graph calls twice: Brevitas's fx would replace them twice.

    Raises:
        QuantizationError: Names the first.
    """
    modules = dict(graph.named_modules())
    calls = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
    for name, times in calls.items():
        if times > 1 and preparation.OPS.get(type(modules[name]), "embedding") != "embedding":
            raise QuantizationError(
                f"the model calls the layer {times} times, and fx takes each layer once",
                where=f"plan, layer {name!r}",
                fix="Write backend: layerwise",
            )


def _require_blocks_fit(planned: Iterable[PlanEntry], size: int) -> None:
    """Refuse blocks that Brevitas would rotate no layer by, and all of its channels instead."""
    widths = {entry.shape[1] for entry in planned if entry.op == "linear" and entry.shape}
    if any(width % size == 0 and width > size for width in widths):
        return
    fitting = [
        near
        for near in range(2, max(widths))
        if any(width % near == 0 and width > near for width in widths) and has_hadamard(near)
    ]
    near = min(fitting, key=lambda one: abs(one - size), default=None)
    raise QuantizationError(
        f"blocks of {size} channels divide the inputs of no Linear layer: {sorted(widths)}",
        where="rotation.block_size",
        fix=f"Write block_size: {near}, or leave it out" if near else "Leave it out",
    )


def _require_blocks(model: nn.Module, planned: Iterable[PlanEntry], name: str) -> None:
    if name not in dict(model.named_modules()):
        near = [path for path, module in model.named_modules() if isinstance(module, _HOLDERS)]
        raise QuantizationError(
            "the model has no such module",
            where=f"algorithm.blocks: {name}",
            fix=f"Modules that hold others in a row: {', '.join(filter(None, near)) or 'none'}",
        )
    if not any(entry.name.startswith(f"{name}.") for entry in planned):
        raise QuantizationError(
            "no layer in these blocks is quantized",
            where=f"algorithm.blocks: {name}",
            fix="Name the module that holds the blocks, such as model.layers",
        )


def _require_rest(planned: Iterable[PlanEntry], rank: int) -> None:
    layers = [entry for entry in planned if entry.op == "linear"]
    if not layers:
        raise QuantizationError(
            "low_rank is for Linear layers, and none is quantized",
            where="plan",
            fix="Leave low_rank out",
        )
    for entry in layers:
        most = min(entry.shape or (rank + 1,))
        if rank >= most:
            raise QuantizationError(
                f"a float branch of rank {rank} leaves nothing of a weight of rank {most}",
                where=f"layer {entry.name!r}",
                fix=f"Write low_rank.rank: {max(1, most // 8)}, or skip the layer by a rule",
            )


def warnings(entries: Iterable[PlanEntry], config: BrevitasConfig) -> Iterable[str]:
    """Sentences to read before starting."""
    planned = [entry for entry in entries if entry.weight is not None]
    yield from _left_float(entries)
    left = [entry.name for entry in planned if not preparation.is_roundable(entry)]
    if config.algorithm is not None and left:
        yield (
            f"{config.algorithm.name} leaves transposed convolutions and embeddings to the nearest "
            f"codes: {', '.join(left)}"
        )
    rotation = config.rotation
    if rotation is not None and (rotation.mode == "layerwise" or rotation.online):
        layers = [entry for entry in planned if entry.op == "linear"]
        stay = [entry.name for entry in layers if not has_hadamard((entry.shape or (0, 0))[1])]
        if stay:
            yield f"not rotated at run time, as no Hadamard matrix is so wide: {', '.join(stay)}"
    seconds = _hqo_seconds(planned)
    if config.hqo and seconds > _WORTH_A_WARNING:
        yield (
            f"hqo searches {len(planned)} weights in up to {seconds:.0f} s on one core; mse is "
            "usually as good and takes seconds"
        )
    if any(
        spec.scale in ("power_of_two", "e8m0") for entry in planned for spec in entry.specs.values()
    ):
        yield (
            "power-of-two scales: Brevitas takes exponents from a rounded logarithm, so a largest "
            "magnitude within 1e-6 below a power of two counts as that power; quark-native reads "
            "the exponent's bits instead"
        )


def _left_float(entries: Iterable[PlanEntry]) -> Iterable[str]:
    """A sentence for each reason why layers stay float."""
    by_reason: dict[str, list[str]] = {}
    for entry in entries:
        if entry.reason.startswith("stays"):
            by_reason.setdefault(entry.reason, []).append(entry.name)
    for reason, names in by_reason.items():
        listed = ", ".join(names[:5]) + ("..." if len(names) > 5 else "")
        verb = reason if len(names) == 1 else reason.replace("stays", "stay", 1)
        yield f"{listed} {verb}"


@cache
def has_hadamard(width: int) -> bool:
    """Whether Brevitas can rotate so many channels by a Hadamard matrix."""
    from brevitas.graph.hadamard import get_hadK

    try:
        get_hadK(width)
    except AssertionError:
        return False
    return True


def _require_whole_groups(entry: PlanEntry) -> None:
    spec, shape = entry.weight, entry.shape
    assert spec is not None
    granularity = spec.granularity
    if granularity is None or granularity.kind != "group" or spec.number_format.is_block:
        return
    assert shape is not None
    assert granularity.size is not None
    count = shape[0] if entry.op.startswith("conv_transpose") else shape[1]
    if count % granularity.size == 0:
        return
    near = min(
        (size for size in range(2, count + 1) if count % size == 0),
        key=lambda size: abs(size - (granularity.size or 0)),
        default=None,
    )
    nearest = f"group:{near}" if near else "channel"
    raise QuantizationError(
        f"groups of {granularity.size} do not divide the {count} inputs of the layer",
        where=f"plan, layer {entry.name!r}",
        fix=f"Write {nearest} in a rule for it, or pad_groups: true",
    )


def _require_search(entry: PlanEntry, config: BrevitasConfig) -> None:
    spec = entry.weight
    assert spec is not None
    assert spec.granularity is not None
    if (
        config.hqo
        and not spec.symmetric
        and spec.granularity.kind == "channel"
        and entry.op != "linear"
    ):
        raise QuantizationError(
            "Brevitas's hqo has no zero points for the channels of a convolution",
            where=f"plan, layer {entry.name!r}",
            fix=f"Write {spec.format}/tensor/asym or {spec.format}/channel/sym in a rule for it",
        )


def _require_register(entry: PlanEntry, config: BrevitasConfig) -> None:
    spec = entry.weight
    assert spec is not None
    assert spec.granularity is not None
    if (
        accumulator_of(config.algorithm) is not None
        and spec.granularity.kind == "group"
        and entry.op.startswith("conv")
    ):
        raise QuantizationError(
            "groups of a convolution's channels are no tiles of its dot products, which an "
            "accumulator sums up",
            where=f"plan, layer {entry.name!r}",
            fix=f"Write {spec.format}/channel in a rule for it",
        )


def _require_numbers(entry: PlanEntry, layer: nn.Module) -> None:
    weight = layer.get_parameter("weight")
    if not weight.is_meta and not bool(weight.isfinite().all()):
        raise QuantizationError(
            "its weight holds NaN or infinities",
            where=f"plan, layer {entry.name!r}",
            fix="Look at how the model was trained or loaded, or skip the layer by a rule",
        )


def _require_channels(entry: PlanEntry, layer: nn.Module) -> None:
    """Brevitas counts a transposed convolution's channels without regard to its groups."""
    spec = entry.weight
    assert spec is not None
    assert spec.granularity is not None
    groups = getattr(layer, "groups", 1)
    if groups > 1 and spec.granularity.kind == "channel" and entry.op.startswith("conv_transpose"):
        raise QuantizationError(
            f"Brevitas has no scales for the channels of a transposed convolution in {groups} "
            "groups",
            where=f"plan, layer {entry.name!r}",
            fix=f"Write {spec.format}/tensor in a rule for it",
        )


def _require_bias(entry: PlanEntry, layer: nn.Module) -> None:
    dtype = layer.get_parameter("weight").dtype
    if entry.bias is not None and dtype in (torch.float16, torch.bfloat16):
        raise QuantizationError(
            f"{entry.bias.format} biases have more digits than {str(dtype).removeprefix('torch.')}",
            where=f"plan, layer {entry.name!r}",
            fix="Load the model in float32, or leave bias out",
        )


def _require_padding(entry: PlanEntry, layer: nn.Module) -> None:
    """Padding by anything but zeros goes over a tensor whose groups have scales of their own."""
    spec, mode = entry.input, getattr(layer, "padding_mode", "zeros")
    if spec is None or mode == "zeros":
        return
    assert spec.granularity is not None
    if spec.granularity.kind == "group":
        raise QuantizationError(
            f"Brevitas cannot pad an input whose groups have scales by padding_mode {mode!r}",
            where=f"plan, layer {entry.name!r}",
            fix="Write input: int8 or input: null in a rule for it",
        )


def _hqo_seconds(planned: Iterable[PlanEntry]) -> float:
    """The longest it can take: a search for symmetric scales, which seldom stops early."""
    return sum(
        _HQO_STEPS * (_HQO_SECONDS_A_STEP + _HQO_SECONDS_AN_ELEMENT * prod(entry.shape or ()))
        for entry in planned
        if entry.weight is not None and entry.weight.symmetric
    )
