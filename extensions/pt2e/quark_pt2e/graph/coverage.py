"""What a quantizer decided about each node: the plan's entries, read from its annotations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from quark_core.plan import PlanEntry
from quark_core.selection import Decision
from quark_core.spec import Granularity, Observer, Role, TensorSpec
from quark_pt2e.graph.naming import Site, is_float, op_name

WEIGHTED = {
    "conv1d": (1, 2),
    "conv2d": (1, 2),
    "conv3d": (1, 2),
    "convolution": (1, 2),
    "conv_transpose1d": (1, 2),
    "conv_transpose2d": (1, 2),
    "conv_transpose3d": (1, 2),
    "linear": (1, 2),
    "embedding": (0, None),
}
"""Operations with a weight and a bias, and which arguments those are."""

_OBSERVERS = (
    ("Histogram", "mse"),
    ("MovingAverage", "moving_average"),
    ("MovingAvg", "moving_average"),
)


_NOTE = "quark_note"
_NAME = "quark_name"
_NORMS = ("batch_norm",)


@dataclass(frozen=True)
class Note:
    """What a quantizer decided about a node, in the host's terms.

    Attributes:
        specs: The tensors it quantizes.
        shape: Shape of the node's weight, or None.
        annotated: Whether the quantizer looked at the node at all.
        used: Whether the node's result reaches an output.
    """

    specs: dict[Role, TensorSpec]
    shape: tuple[int, ...] | None
    annotated: bool
    used: bool = True


def annotation(node: fx.Node) -> QuantizationAnnotation | None:
    """What a quantizer wrote onto a node, or None."""
    found: QuantizationAnnotation | None = node.meta.get(Q_ANNOTATION_KEY)
    return found


def note(graph: fx.GraphModule) -> None:
    """Read a graph's annotations onto its nodes, before observers change their arguments."""
    used: set[fx.Node] = set()
    for node in reversed(graph.graph.nodes):
        if node.op != "call_function" or node.is_impure() or used.intersection(node.users):
            used.add(node)
    for node in graph.graph.nodes:
        # What nobody reads is dropped when the graph is converted.
        specs = _specs(node) if node in used else {}
        node.meta[_NOTE] = Note(specs, _weight_shape(node), _is_annotated(node), node in used)


def fold_norms(graph: fx.GraphModule) -> None:
    """After :func:`note`: what a batch norm returns is what the layer it is folded into returns."""
    for node in graph.graph.nodes:
        before = node.args[0] if op_name(node) in _NORMS else None
        if not isinstance(before, fx.Node) or op_name(before) not in WEIGHTED:
            continue
        own, noted = before.meta[_NOTE], node.meta[_NOTE]
        if "output" in own.specs or len(before.users) > 1:
            continue
        made = {"output": noted.specs["output"]} if "output" in noted.specs else {}
        before.meta[_NOTE] = dataclasses.replace(own, specs={**own.specs, **made})
        del node.meta[_NOTE]


def is_noted(site: Site) -> bool:
    """Whether there is something to say of a node: not of a batch norm that is folded."""
    return bool(site.branch) or _NOTE in site.node.meta


def mark(sites: Sequence[Site]) -> None:
    """Write each node's name onto it, where it survives copying and converting."""
    for site in sites:
        site.node.meta[_NAME] = site.target.name


def marked(graph: fx.GraphModule) -> dict[str, tuple[str, str]]:
    """Where the nodes of a graph are that :func:`mark` named; branches are not looked into."""
    return {node.meta[_NAME]: ("", node.name) for node in graph.graph.nodes if _NAME in node.meta}


def entries(
    sites: Sequence[Site], decisions: Mapping[str, Decision], quantizer: str
) -> tuple[PlanEntry, ...]:
    """One entry for each node that yields or takes a float tensor.

    Args:
        sites: The nodes of a graph and its branches, after :func:`note`.
        decisions: What the rules say, by name.
        quantizer: Name of the quantizer, for reasons.
    """
    return tuple(
        _entry(site, decisions[site.target.name], quantizer)
        for site in sites
        if is_float(site.node) or site.node.op == "output"
    )


def _entry(site: Site, decision: Decision, quantizer: str) -> PlanEntry:
    noted: Note | None = site.node.meta.get(_NOTE)
    reason = "" if noted and noted.specs else _reason(site, decision, noted, quantizer)
    noted = noted or Note({}, None, False)
    return PlanEntry(
        name=site.target.name,
        type=site.target.types[0] if site.target.types else str(site.node.target),
        op=site.target.op,
        shape=noted.shape,
        weight=noted.specs.get("weight"),
        input=noted.specs.get("input"),
        output=noted.specs.get("output"),
        bias=noted.specs.get("bias"),
        rule=decision.why,
        reason=reason,
    )


def _specs(node: fx.Node) -> dict[Role, TensorSpec]:
    found = annotation(node)
    specs: dict[Role, TensorSpec] = {}
    if found is None:
        return specs
    for role, argument, qspec in _inputs(node, found):
        spec = described(qspec, role)
        # A plan has one input; further ones are in the encodings.
        if spec is not None and is_float(argument):
            specs.setdefault(role, spec)
    if is_float(node) and node.users:
        made = described(found.output_qspec, "output")
        if made is not None:
            specs["output"] = made
    return specs


def _reason(site: Site, decision: Decision, noted: Note | None, quantizer: str) -> str:
    if decision.skip:
        return "left out by the rule"
    if noted is None:
        return "branches: float leaves it" if site.branch else f"{quantizer} never saw it"
    if site.node.op in ("placeholder", "output"):
        return "its neighbours decide"
    if not noted.used:
        return "its result is not used"
    if noted.annotated:
        return "part of a fused pattern, or excluded"
    return f"{quantizer} has no pattern for it here"


def _inputs(node: fx.Node, found: QuantizationAnnotation) -> list[tuple[Role, fx.Node, Any]]:
    weight, bias = WEIGHTED.get(op_name(node), (None, None))
    args = node.args
    rows: list[tuple[Role, fx.Node, Any]] = []
    for argument, qspec in found.input_qspec_map.items():
        role: Role = "input"
        if weight is not None and len(args) > weight and argument is args[weight]:
            role = "weight"
        elif bias is not None and len(args) > bias and argument is args[bias]:
            role = "bias"
        rows.append((role, argument, qspec))
    return rows


def _is_annotated(node: fx.Node) -> bool:
    found = annotation(node)
    return found is not None and found._annotated


def _weight_shape(node: fx.Node) -> tuple[int, ...] | None:
    index, _ = WEIGHTED.get(op_name(node), (None, None))
    if index is None:
        return None
    weight = node.args[index]
    value = weight.meta.get("val") if isinstance(weight, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def described(qspec: Any, role: Role) -> TensorSpec | None:
    """A quantizer's spec in the host's terms, or None where the tensor stays float."""
    seen: set[int] = set()
    while isinstance(qspec, SharedQuantizationSpec):
        if id(qspec) in seen:
            return None
        seen.add(id(qspec))
        edge = qspec.edge_or_node
        node = edge if isinstance(edge, fx.Node) else edge[1]
        found = annotation(node)
        if found is None:
            return None
        qspec = found.output_qspec if node is edge else found.input_qspec_map.get(edge[0])
    if isinstance(qspec, list):
        qspec = qspec[-1] if qspec else None
    dtype = getattr(qspec, "dtype", None)
    if qspec is None or dtype is None or dtype.is_floating_point:
        return None
    scheme = getattr(qspec, "qscheme", None) or torch.per_tensor_affine
    channel = scheme in (torch.per_channel_symmetric, torch.per_channel_affine) or (
        scheme == torch.per_channel_affine_float_qparams
    )
    symmetric = scheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    dynamic = bool(getattr(qspec, "is_dynamic", False))
    return TensorSpec(
        format=format_name(dtype, qspec.quant_min, qspec.quant_max),
        granularity=Granularity("channel" if channel else "tensor"),
        symmetric=symmetric or _derived(qspec),
        observer=None if dynamic else Observer(name=_observer(qspec)),
        dynamic=dynamic,
    ).resolve(role)


def format_name(dtype: torch.dtype, low: int | None, high: int | None) -> str:
    """The narrowest integer format that holds ``low`` to ``high``."""
    info = torch.iinfo(dtype)
    low = info.min if low is None else int(low)
    high = info.max if high is None else int(high)
    bits = max((high).bit_length(), (-low - 1).bit_length() if low < 0 else 0)
    return f"int{bits + 1}" if low < 0 else f"uint{max(bits, 1)}"


def _derived(qspec: Any) -> bool:
    return hasattr(qspec, "derive_qparams_fn")


def _observer(qspec: Any) -> Any:
    maker: Any = getattr(qspec, "observer_or_fake_quant_ctr", None)
    while hasattr(maker, "p"):
        maker = maker.p
    maker = getattr(maker, "func", maker)
    name = getattr(maker, "__name__", "")
    return next((ours for theirs, ours in _OBSERVERS if theirs in name), "minmax")
