"""What will become of each layer, and in which order of passes."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from quark_brevitas import (
    attention,
    computed,
    fusing,
    limits,
    multihead,
    preparation,
    recurrent,
    rotation,
)
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.options import fused_option
from quark_brevitas.pipeline import stages
from quark_core.batch import Batch
from quark_core.errors import DataError, QuantizationError
from quark_core.plan import Plan, PlanEntry, Step
from quark_core.selection import Decision, Selection, Target, select
from quark_core.targets import io_roles, module_targets

_NOT_APART = "stays float: backend: layerwise takes the common kinds apart into Linear layers"
_UNTRACED = {
    "backend": "backend: layerwise",
    "equalize_iterations": "equalize_iterations: 0",
    "channel_splitting": "channel_splitting: 0",
    "rotation.mode": "rotation.mode: fused",
    "activation_equalization.mode": "activation_equalization.mode: fused, or layerwise",
    "attention.mode": "attention.mode: functional",
}
"""What does without a traced graph, by the option that needs one."""


@dataclass(frozen=True)
class _View:
    """A model as the passes will see it.

    Attributes:
        whole: With what a tracer can follow taken apart; the user's model if that is nothing.
        parts: With everything taken apart: its layers are those to be planned.
        traced: What needs a traced graph, or an empty string.
        graph: That graph, its modules taken apart like ``parts``, or None.
        warnings: Sentences about what was found.
    """

    whole: nn.Module
    parts: nn.Module
    traced: str
    graph: Any
    warnings: tuple[str, ...]


def make_plan(model: nn.Module, config: BrevitasConfig, example: Batch | None) -> Plan:
    """Decide for each layer, and order the passes; the model stays as it is.

    Raises:
        QuantizationError: The configuration needs a traced graph and the model has none, or asks
            for something that the model or a layer's shape does not allow.
        DataError: A rule asks for the first or last layer and there is no example.
    """
    limits.require_whole(model)
    view = _view(model, config)
    known = module_targets(view.parts, preparation.OPS)
    layers = [item for item in known if type(item[1]) in preparation.OPS]
    sites = _sites(view, config, example)
    targets = _placed([target for target, _ in layers], view.parts, config, example)
    selection = select([*targets, *sites], config)
    entries = (
        *_entries(layers, view, config, selection),
        *(_left_out(target, layer, why) for target, layer in known if (why := _unknown(layer))),
        *(_site(target, config, selection.decisions[target.name]) for target in sites),
        *_still_whole(view.parts),
    )
    _require(view, entries, config, example)
    on_graph = rotation.works_on_graph(config) and not view.traced
    found = stages(config, entries, view.traced)
    return Plan(
        entries,
        needs_calibration=on_graph
        or config.attention is not None
        or any(stage.run is not None for stage in found),
        steps=tuple(Step(stage.name, stage.reason) for stage in found),
        unmatched=selection.unmatched,
        warnings=(*view.warnings, *limits.warnings(entries, config)),
    )


def _view(model: nn.Module, config: BrevitasConfig) -> _View:
    computed.require_weights(module_targets(model, preparation.OPS), preparation.OPS)
    # With fx, quantizers could not be placed within what comes of taking modules apart.
    apart = config.backend != "fx"
    recurs = apart and any(map(recurrent.can_split, model.modules()))
    attends = apart and any(map(multihead.can_split, model.modules()))
    if attends or computed.has_parametrizations(model):
        model = copy.deepcopy(model)
        computed.settle(model)
    if attends:
        multihead.split_all(model)
    traced, graph, warnings = _traced(model, config)
    if config.backend == "fx":
        limits.require_single_calls(graph)
    parts = model
    if recurs:
        # Only now: a tracer takes recurrent modules whole, and could not follow their steps.
        parts = copy.deepcopy(model)
        warnings += _first_steps(recurrent.split_all(parts), config)
        if graph is not None:
            recurrent.split_all(graph)
    return _View(model, parts, traced, graph, warnings)


def _traced(model: nn.Module, config: BrevitasConfig) -> tuple[str, Any, tuple[str, ...]]:
    """What needs a traced graph, the graph if the model has one, and warnings if not."""
    wanted = preparation.must_trace(config, model)
    if not wanted:
        return "", None, ()
    try:
        return ", ".join(wanted), preparation.trace(model), ()
    except Exception as error:  # noqa: BLE001 (tracing runs the user's forward)
        lines = str(error).strip().splitlines()
        problem = f"{type(error).__name__}: {lines[0] if lines else ''}"
    needed = [option for option in wanted if option != preparation.MERGE_BN]
    if needed:
        raise QuantizationError(
            f"{', '.join(needed)} needs a model that can be traced",
            where="quantizer",
            cause=problem,
            fix=f"Write {_UNTRACED[needed[0].partition(':')[0]]}",
        )
    return "", None, (f"BatchNorm stays apart: the model cannot be traced ({problem})",)


def _first_steps(layers: list[str], config: BrevitasConfig) -> tuple[str, ...]:
    """A warning about Brevitas's own algorithms, which look at a layer's first call only."""
    if getattr(config.algorithm, "engine", "fast") == "fast":
        return ()
    return (
        f"engine: brevitas looks at the first step of a sequence only in {', '.join(layers)}; "
        "engine: fast looks at all",
    )


def _require(
    view: _View, entries: tuple[PlanEntry, ...], config: BrevitasConfig, example: Batch | None
) -> None:
    """Refuse what the model does not allow."""
    limits.require(view.parts, entries, config)
    beside = example.beside(view.parts) if example is not None else None
    if rotation.works_on_graph(config) and (view.traced or beside is not None):
        seen = view.parts
        if view.traced:
            seen = preparation.preprocess(copy.deepcopy(view.whole), config)
        rotation.require_regions(seen, config, beside)
    if beside is not None and (option := fused_option(config)):
        quantized = [entry.name for entry in entries if entry.quantized]
        fusing.required(view.parts, beside, quantized, option)


def _placed(
    targets: list[Target], model: nn.Module, config: BrevitasConfig, example: Batch | None
) -> list[Target]:
    """Targets that know whether they are first or last, if a rule asks."""
    if not any(rule.io for rule in config.rules):
        return targets
    if example is None:
        raise DataError(
            "a rule with io runs one batch to find the first and last layers",
            where="quantizer.rules",
            fix="Give data.calibration, or select those layers by name",
        )
    roles = io_roles(model, [target.name for target in targets], example)
    return [replace(target, io=roles[target.name]) for target in targets]


def _sites(view: _View, config: BrevitasConfig, example: Batch | None) -> list[Target]:
    """Where attention is called, if the configuration asks for it."""
    if config.attention is None:
        return []
    model = view.whole
    beside = example.beside(model) if example is not None else None
    if view.traced:
        model = preparation.preprocess(copy.deepcopy(model), config)
    names = attention.sites(model, beside)
    if not names and (view.traced or beside is not None):
        raise QuantizationError(
            "the model never calls scaled_dot_product_attention",
            where="attention",
            fix="Leave attention out, or load the model with attn_implementation='sdpa'",
        )
    types = ("ScaledDotProductAttention",)
    return [Target(name, types, attention.OP) for name in names]


def _site(target: Target, config: BrevitasConfig, decision: Decision) -> PlanEntry:
    spec = None if decision.skip else config.attention_spec
    return PlanEntry(target.name, target.types[0], target.op, input=spec, rule=decision.why)


def _entries(
    layers: list[tuple[Target, nn.Module]],
    view: _View,
    config: BrevitasConfig,
    selection: Selection,
) -> list[PlanEntry]:
    """One for each layer that Brevitas has a counterpart of."""
    called = set(dict(view.graph.named_modules())) if view.graph is not None else None
    biased = view.parts
    if view.graph is not None and config.merge_bn and _wants_bias(config):
        # Folding BatchNorm gives biases to layers that have none yet.
        biased = preparation.fold_norms(view.graph)
    found = []
    for target, layer in layers:
        decision = selection.decisions[target.name]
        if called is not None and target.name not in called:
            found.append(_left_out(target, layer, "float: the model never calls it"))
        elif target.op == "embedding":
            found.append(_embedding(target, layer, config, decision))
        else:
            has_bias = biased.get_submodule(target.name).bias is not None
            found.append(_entry(target, layer, decision, biased=has_bias))
    return found


def _wants_bias(config: BrevitasConfig) -> bool:
    return config.bias is not None or any(rule.bias for rule in config.rules)


def _entry(target: Target, layer: nn.Module, decision: Decision, *, biased: bool) -> PlanEntry:
    specs = decision.specs
    granularity = specs["input"].granularity if specs["input"] is not None else None
    reason = "" if biased or specs["bias"] is None else "has no bias"
    if granularity is not None and granularity.kind == "token" and target.op != "linear":
        specs = dict.fromkeys(specs)
        reason = "stays float: token scales belong to Linear layers"
    return PlanEntry(
        name=target.name,
        type=type(layer).__name__,
        op=target.op,
        shape=tuple(layer.get_parameter("weight").shape),
        weight=specs["weight"],
        input=specs["input"],
        bias=specs["bias"] if biased else None,
        rule=decision.why,
        reason=reason,
    )


def _embedding(
    target: Target, layer: nn.Module, config: BrevitasConfig, decision: Decision
) -> PlanEntry:
    """An embedding's weight, if a rule asks for it: Brevitas's own examples leave it float."""
    rule = None if decision.rule is None else config.rules[decision.rule]
    spec = decision.specs["weight"]
    reason = ""
    if rule is None or (not rule.skip and "weight" not in rule.model_fields_set):
        spec, reason = None, "float unless a rule for it gives a weight"
    elif spec is not None and layer.max_norm is not None:
        spec, reason = None, "stays float: max_norm changes its weight at run time"
    shape = tuple(layer.get_parameter("weight").shape)
    return PlanEntry(
        target.name,
        type(layer).__name__,
        target.op,
        shape,
        weight=spec,
        rule=decision.why,
        reason=reason,
    )


def _still_whole(model: nn.Module) -> tuple[PlanEntry, ...]:
    """Modules with several weights that nobody has taken apart."""
    return tuple(
        PlanEntry(name, type(module).__name__, type(module).__name__.lower(), reason=_NOT_APART)
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase)
    )


def _unknown(layer: nn.Module) -> str:
    """Why Brevitas leaves a class derived from one of its layers; empty for the layers."""
    if type(layer) in preparation.OPS:
        return ""
    if hasattr(layer, "weight_quant"):
        return "as it is: it is one of Brevitas's quantized layers already"
    base = next(kind.__name__ for kind in type(layer).__mro__ if kind in preparation.OPS)
    return f"float: Brevitas replaces {base}, but no class derived from it"


def _left_out(target: Target, layer: nn.Module, why: str) -> PlanEntry:
    """A layer that is missing from the traced graph, or that Brevitas does not know."""
    shape = tuple(getattr(layer, "weight", torch.empty(0)).shape)
    # Nobody expects embeddings to be quantized who has not written a rule for them.
    reason = why if target.op == "embedding" else f"stays {why}"
    return PlanEntry(target.name, type(layer).__name__, target.op, shape=shape, reason=reason)
