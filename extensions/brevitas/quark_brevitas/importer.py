"""Configurations of AMD Quark's Brevitas extension as those of this backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from quark_core.errors import ConfigError, Problem

_SCALES = {"float": "", "float_scale": "", "pof2": "power_of_two", "po2_scale": "power_of_two"}
_TENSORS = {"weight": "weight", "input_tensors": "input", "bias": "bias"}
_GRANULARITIES = ("tensor", "channel")
_METHODS = ("stats", "mse")
_BIASES = (16, 32)
_ALGORITHMS = {"gptq": "gptq", "gpfq": "gpfq", "gpfa2q": "gpfq"}
_PERCENTILE = "percentile:99.999"
"""What Quark's extension uses for every static input."""
_ORDER = {"gptq": 0, "gpfq": 0, "gpfa2q": 0, "calibratebatchnorm": 1, "biascorrection": 2}
"""The order in which algorithms run here, whatever the order of the list."""
_FIELDS = {
    "Config": {
        *("global_quant_config", "pre_quant_opt_config", "algo_config", "backend"),
    },
    "QLayerConfig": {"input_tensors", "output_tensors", "weight", "bias"},
    "QTensorConfig": {
        *("qscheme", "symmetric", "scale_type", "quant_type", "param_type", "bit_width"),
        *("exponent_bit_width", "mantissa_bit_width"),
    },
    "Preprocess": {
        *("trace_model", "equalize_iterations", "equalize_merge_bias", "merge_batch_norm"),
        *("channel_splitting_ratio", "channel_splitting_split_input"),
    },
    "ActivationEqualization": {"is_layerwise", "alpha"},
    "GPTQ": {"act_order"},
    "GPFQ": {"act_order", "percentage_of_processed_inputs"},
    "GPFA2Q": {"act_order", "percentage_of_processed_inputs", "accumulator_bit_width"},
    "CalibrateBatchNorm": set[str](),
    "BiasCorrection": set[str](),
}
"""What the classes of Quark's extension hold; more than that was never read by it."""
_ELSEWHERE = {
    "awq": "awq: {}",
    "svdquant": "low_rank: {rank: 32}",
    "rotation": "merge_layernorm: true and rotation: {}",
    "quarot": "merge_layernorm: true and rotation: {}",
    "smooth": "activation_equalization: {alpha: 0.5}",
    "smoothquant": "activation_equalization: {alpha: 0.5}",
    "qronos": "algorithm: qronos",
    "autoround": "algorithm: learned_round",
}
"""Algorithms of Quark's own quantizer, which its extension has not, and what does the same here."""


def from_quark(config: Any) -> dict[str, Any]:
    """The fields of a :class:`~quark_brevitas.config.BrevitasConfig` that mean the same.

    Args:
        config: A ``Config`` of ``quark.contrib.brevitas``, or the same as nested mappings; entries
            of its lists name their class under ``type`` then.

    Raises:
        ConfigError: Something in it has no counterpart; every such place is listed.
    """
    data, problems = _plain(config), list[Problem]()
    _require_form(data)
    _unread(data, "Config", "", problems)
    found: dict[str, Any] = {"name": "brevitas", "merge_bn": False}
    backend = str(data.get("backend") or "layerwise").lower()
    if backend != "layerwise":
        problems.append(Problem("backend", f"{backend!r}: Quark's extension knows layerwise only"))
    layer = data.get("global_quant_config") or {}
    _unread(layer, "QLayerConfig", "global_quant_config", problems)
    for theirs, ours in _TENSORS.items():
        if layer.get(theirs) is not None:
            place = f"global_quant_config.{theirs}"
            found[ours] = _spec(layer[theirs], ours, place, problems)
    weight = layer.get("weight")
    if weight is not None and weight.get("symmetric", True) and not _floating(weight):
        # What Brevitas's own quantizers of weights do, which Quark's extension takes as they are.
        found["narrow_range"] = True
    if layer.get("output_tensors") is not None:
        problems.append(
            Problem(
                "global_quant_config.output_tensors",
                "outputs are not quantized: quantize the inputs of the layers after",
            )
        )
    for part in ("pre_quant_opt_config", "algo_config"):
        given = data.get(part)
        # Left out, Quark preprocesses; an empty list does nothing.
        entries = [{"type": "Preprocess"}] if given is None and part[0] == "p" else given or []
        for index, entry in enumerate(entries):
            _pass(entry, f"{part}[{index}]", found, problems)
    _ordered(data.get("algo_config") or [], problems)
    if problems:
        raise ConfigError(problems, fix="Change these places by hand")
    return found


def _require_form(data: Any) -> None:
    """Refuse what has not the shape of a ``Config``, before anything in it is read."""
    if not isinstance(data, Mapping):
        raise ConfigError(
            [
                Problem(
                    "configuration",
                    f"is a {type(data).__name__}: give Quark's Config or the same as a mapping, "
                    "such as json.load returns",
                )
            ]
        )
    layer = data.get("global_quant_config") or {}
    mappings = {"global_quant_config": layer}
    if isinstance(layer, Mapping):
        given = {name: layer[name] for name in _TENSORS if layer.get(name) is not None}
        mappings |= {f"global_quant_config.{name}": part for name, part in given.items()}
    problems = []
    for part in ("pre_quant_opt_config", "algo_config"):
        entries = data.get(part) or []
        if isinstance(entries, list):
            mappings |= {f"{part}[{index}]": entry for index, entry in enumerate(entries)}
        else:
            problems.append(Problem(part, f"{entries!r} is not accepted: write a list: [...]"))
    problems += [
        Problem(place, f"{part!r} is not accepted: write a mapping: {{name: value}}")
        for place, part in mappings.items()
        if not isinstance(part, Mapping)
    ]
    if problems:
        raise ConfigError(problems)


def _pass(
    entry: Mapping[str, Any], place: str, found: dict[str, Any], problems: list[Problem]
) -> None:
    kind = _kind(entry)
    if kind in _FIELDS:
        _unread(entry, kind, place, problems)
    if kind == "Preprocess":
        found["merge_bn"] = entry.get("merge_batch_norm", True)
        found["equalize_iterations"] = entry.get("equalize_iterations", 20)
        found["equalize_merge_bias"] = entry.get("equalize_merge_bias", True)
        if entry.get("channel_splitting_ratio"):
            found["channel_splitting"] = entry["channel_splitting_ratio"]
            found["split_inputs"] = entry.get("channel_splitting_split_input", False)
    elif kind == "ActivationEqualization":
        mode = "layerwise" if entry.get("is_layerwise", True) else "fx"
        found["activation_equalization"] = {"mode": mode, "alpha": entry.get("alpha", 0.5)}
    elif kind.lower() in _ALGORITHMS:
        share = entry.get("percentage_of_processed_inputs", 1.0)
        if share != 1.0:
            problems.append(
                Problem(
                    f"{place}.percentage_of_processed_inputs",
                    f"{share}: all inputs are looked at here, as by Brevitas since 0.12: write 1.0",
                )
            )
        register: dict[str, int] = {}
        if kind.lower() == "gpfa2q":
            register = {"bits": entry.get("accumulator_bit_width", 16)}
        if "algorithm" in found:
            problems.append(Problem(place, f"{kind}: there is an algorithm already"))
        found["algorithm"] = {
            "name": _ALGORITHMS[kind.lower()],
            "act_order": entry.get("act_order", False),
            **({"accumulator": register} if register else {}),
        }
    elif kind == "BiasCorrection":
        found["bias_correction"] = True
    elif kind == "CalibrateBatchNorm":
        found["calibrate_bn"] = True
    elif kind.lower() in _ELSEWHERE:
        problems.append(
            Problem(
                place,
                f"{kind}: Quark's Brevitas extension has no such pass: write "
                f"{_ELSEWHERE[kind.lower()]} in what comes of the rest",
            )
        )
    else:
        problems.append(
            Problem(
                place,
                f"{kind or 'an entry without type'} is unknown: known are Preprocess, "
                "ActivationEqualization, GPTQ, GPFQ, GPFA2Q, BiasCorrection, CalibrateBatchNorm",
            )
        )


def _kind(entry: Mapping[str, Any]) -> str:
    return str(entry.get("type", "")).removesuffix("Config")


def _floating(tensor: Mapping[str, Any]) -> bool:
    return "float" in str(tensor.get("quant_type", "int_quant")).lower()


def _unread(given: Mapping[str, Any], kind: str, place: str, problems: list[Problem]) -> None:
    """List fields that Quark's class has not, and that would be lost in silence."""
    known = _FIELDS[kind]
    for name in given:
        if name not in known and name != "type":
            path = f"{place}.{name}" if place else name
            names = ", ".join(sorted(known)) or "none"
            problems.append(Problem(path, f"{kind} has no such field: it has {names}"))


def _ordered(entries: list[Mapping[str, Any]], problems: list[Problem]) -> None:
    """List algorithms that would run in another order than that of the list."""
    last, latest = -1, ""
    for index, entry in enumerate(entries):
        kind = _kind(entry)
        at = _ORDER.get(kind.lower(), last)
        if at < last:
            problems.append(
                Problem(
                    f"algo_config[{index}]",
                    f"{kind} runs before {latest} here, whatever the order of the list: put it "
                    "first",
                )
            )
        elif at > last:
            last, latest = at, kind


def _spec(tensor: Mapping[str, Any], role: str, place: str, problems: list[Problem]) -> str:
    bits, symmetric = tensor.get("bit_width", 8), tensor.get("symmetric", True)
    granularity = str(tensor.get("qscheme", "per_tensor")).lower().removeprefix("per_")
    scale = str(tensor.get("scale_type", "float")).lower()
    method = str(tensor.get("param_type", "stats")).lower()
    _unread(tensor, "QTensorConfig", place, problems)
    if granularity not in _GRANULARITIES or (role == "input" and granularity != "tensor"):
        known = "per_tensor" if role == "input" else "per_tensor and per_channel"
        problems.append(
            Problem(f"{place}.qscheme", f"per_{granularity}: Quark's extension knows {known} here")
        )
    if method not in _METHODS:
        problems.append(
            Problem(f"{place}.param_type", f"{method!r} is unknown: known are stats and mse")
        )
    if role == "bias" and bits not in _BIASES:
        problems.append(
            Problem(f"{place}.bit_width", f"biases have 16 or 32 bits here, not {bits}")
        )
    if scale not in _SCALES:
        problems.append(
            Problem(f"{place}.scale_type", f"{scale!r} is unknown: known are float and pof2")
        )
    if _floating(tensor):
        exponent, mantissa = tensor.get("exponent_bit_width"), tensor.get("mantissa_bit_width")
        if not exponent or mantissa is None or 1 + exponent + mantissa != bits:
            problems.append(
                Problem(
                    place,
                    f"bit_width {bits} is not one sign, {exponent} exponent and {mantissa} "
                    "mantissa bits",
                )
            )
        parts = [f"fp[1|{exponent}|{mantissa}]"]
    else:
        parts = [f"int{bits}"]
    if role == "bias":
        return parts[0]
    parts += [granularity, "sym" if symmetric else "asym", _SCALES.get(scale, "")]
    if method == "mse":
        parts.append("mse")
    elif role == "input":
        parts.append(_PERCENTILE)
    return "/".join(part for part in parts if part)


def _plain(value: Any) -> Any:
    """Dataclasses as mappings that name their class, enumerations as their values."""
    if is_dataclass(value) and not isinstance(value, type):
        known = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        return {"type": type(value).__name__, **known}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
