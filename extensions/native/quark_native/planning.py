"""Planning: what happens to each layer of a model, and why. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from quark_core.batch import Batch
from quark_core.config import QuantizationConfig
from quark_core.errors import DataError
from quark_core.plan import Plan, PlanEntry, Step
from quark_core.selection import Decision, Target, select
from quark_core.spec import Role, TensorSpec
from quark_core.targets import io_roles, module_targets
from quark_native.nn import OPS, QuantizedLayer, layer_format

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SKIPPED = "skipped by the rule"


def make_plan(model: nn.Module, config: QuantizationConfig, example: Batch | None) -> Plan:
    """Decide for each layer that quark-native knows.

    Raises:
        DataError: A rule selects by ``io`` but there is no example to find the ends with.
    """
    found = module_targets(model, OPS)
    targets = _with_io([target for target, _ in found], model, config, example)
    selection = select(targets, config)
    entries = [
        _entry(target, module, selection.decisions[target.name])
        for target, (_, module) in zip(targets, found, strict=True)
    ]
    modules = {target.name: module for target, module in found}
    needs_calibration = any(_calibrated(entry) for entry in entries)
    return Plan(
        tuple(entries),
        needs_calibration=needs_calibration,
        steps=_steps(needs_calibration),
        unmatched=selection.unmatched,
        warnings=(*_stays_float(entries), *_ties(entries, modules), *_bloat(entries, modules)),
    )


def is_static(entry: PlanEntry, role: Role, spec: TensorSpec) -> bool:
    """Whether a tensor's range comes from calibration."""
    activation = role in ("input", "output")
    return activation and not spec.dynamic and layer_format(entry.op, role, spec).covers


def _calibrated(entry: PlanEntry) -> bool:
    return any(is_static(entry, role, spec) for role, spec in entry.specs.items())


def _steps(needs_calibration: bool) -> tuple[Step, ...]:
    calibrate = Step("calibrate", "ranges of static inputs and outputs come from data")
    encode = Step("encode", "weights and biases take their scales from their own values")
    return (calibrate, encode) if needs_calibration else (encode,)


def _with_io(
    targets: list[Target], model: nn.Module, config: QuantizationConfig, example: Batch | None
) -> list[Target]:
    if not any(rule.io for rule in config.rules):
        return targets
    if example is None:
        raise DataError(
            "a rule with io needs one batch, to see which layers read the model's input or make "
            "its output",
            where="quantizer.rules",
            fix="Give data.calibration, or select those layers by name",
        )
    roles = io_roles(model, [target.name for target in targets], example)
    return [replace(target, io=roles[target.name]) for target in targets]


def _entry(target: Target, module: nn.Module, decision: Decision) -> PlanEntry:
    weight = module._parameters.get("weight")
    shape = None if weight is None or is_lazy(weight) else tuple(weight.shape)
    specs = {role: spec for role, spec in decision.specs.items() if spec is not None}
    reason = _SKIPPED if decision.skip else ""
    if specs:
        reason = _cannot(target.op, module, specs)
        if reason:
            specs = {}
        else:
            specs, reason = _narrowed(target.op, module, specs)
    return PlanEntry(
        target.name,
        type(module).__name__,
        target.op,
        shape,
        **specs,
        rule=decision.why,
        reason=reason,
    )


def _cannot(op: str, module: nn.Module, specs: dict[Role, TensorSpec]) -> str:
    """Why a layer cannot be quantized as asked, or nothing."""
    constants: tuple[Role, ...] = ("weight", "bias")
    problem = _unfit(module)
    for role in constants:
        tensor = module._parameters.get(role)
        if not problem and role in specs and tensor is not None:
            try:
                layer_format(op, role, specs[role]).layout.check(tuple(tensor.shape))
            except ValueError as error:
                problem = f"{role} cannot be {specs[role]}: {error}"
    return problem


def _unfit(module: nn.Module) -> str:
    """Why a layer cannot be quantized at all, or nothing."""
    weight = module._parameters.get("weight")
    if isinstance(module, QuantizedLayer):
        return "it is quantized already"
    if weight is None:
        return "its weight is computed by a hook or parametrization, not stored: remove that first"
    if is_lazy(weight):
        return "its shape is not known yet: run the model once before"
    if weight.dtype not in _DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not floating point"
    if not weight.numel():
        return "its weight is empty"
    renormed = isinstance(module, nn.Embedding) and module.max_norm is not None
    return "max_norm changes the weight during forward" if renormed else ""


def _narrowed(
    op: str, module: nn.Module, specs: dict[Role, TensorSpec]
) -> tuple[dict[Role, TensorSpec], str]:
    """The specs of the tensors that the layer has, and why others were left out."""
    left_out: set[Role] = set()
    reason = ""
    if op == "embedding" and "input" in specs:
        left_out.add("input")
        reason = "its input holds indices and stays as it is"
    if isinstance(module, NonDynamicallyQuantizableLinear) and specs.keys() & {"input", "output"}:
        left_out |= {"input", "output"}
        reason = (
            "MultiheadAttention reads its weight without calling it: input and output stay float"
        )
    if module._parameters.get("bias") is None:
        left_out.add("bias")
    return {role: spec for role, spec in specs.items() if role not in left_out}, reason


def _stays_float(entries: Iterable[PlanEntry]) -> list[str]:
    return [
        f"{entry.name} stays float: {entry.reason}"
        for entry in entries
        if not entry.quantized and entry.reason not in ("", _SKIPPED)
    ]


def _ties(entries: Sequence[PlanEntry], modules: dict[str, nn.Module]) -> list[str]:
    """Warnings of layers that share a weight in float but not when quantized."""
    sharing: dict[int, list[PlanEntry]] = {}
    for entry in entries:
        sharing.setdefault(id(modules[entry.name]._parameters.get("weight")), []).append(entry)
    return [
        f"{' and '.join(entry.name for entry in tied)} share one weight in the float model; "
        "quantized differently, it is stored more than once"
        for tied in sharing.values()
        if len({weight_key(entry) for entry in tied}) > 1 and tied[0].shape is not None
    ]


def weight_key(entry: PlanEntry) -> object:
    """What two layers that share a float weight must agree on to share the quantized one."""
    if entry.weight is None:
        return None
    return str(entry.weight), layer_format(entry.op, "weight", entry.weight).layout


def _bloat(entries: Iterable[PlanEntry], modules: dict[str, nn.Module]) -> list[str]:
    """Warnings of weights whose scales take more room than quantizing saves."""
    found = []
    for entry in entries:
        if entry.weight is None or entry.shape is None:
            continue
        fmt = layer_format(entry.op, "weight", entry.weight)
        shared = torch.empty(entry.shape, device="meta")
        scales = fmt.layout.extremes(shared)[0].numel()
        scale_bits = 32 if fmt.scale_format == "float32" else 8
        bits = shared.numel() * fmt.number.bits + scales * scale_bits
        before = modules[entry.name].get_parameter("weight").element_size() * 8 * shared.numel()
        if bits >= before:
            found.append(
                f"{entry.name}.weight takes no less room as {entry.weight}: one scale for every "
                f"{-(-shared.numel() // scales)} of {shared.numel()} values"
            )
    return found
