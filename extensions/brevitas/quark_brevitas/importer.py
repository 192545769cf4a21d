"""Configurations of AMD Quark's Brevitas extension as those of this backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from quark_core.errors import ConfigError, Problem

_SCALES = {"float": "", "float_scale": "", "pof2": "power_of_two", "po2_scale": "power_of_two"}
_TENSORS = {"weight": "weight", "input_tensors": "input", "bias": "bias"}
_ALGORITHMS = {"gptq": "gptq", "gpfq": "gpfq", "gpfa2q": "gpfq"}
_PERCENTILE = "percentile:99.999"
"""What Quark's extension uses for every static input."""


def from_quark(config: Any) -> dict[str, Any]:
    """The fields of a :class:`~quark_brevitas.config.BrevitasConfig` that mean the same.

    Args:
        config: A ``Config`` of ``quark.contrib.brevitas``, or the same as nested mappings; entries
            of its lists name their class under ``type`` then.

    Raises:
        ConfigError: Something in it has no counterpart; every such place is listed.
    """
    data, problems = _plain(config), list[Problem]()
    found: dict[str, Any] = {"name": "brevitas", "merge_bn": False}
    backend = str(data.get("backend") or "layerwise").lower()
    if backend != "layerwise":
        problems.append(Problem("backend", f"{backend!r}: Quark's extension knows layerwise only"))
    layer = data.get("global_quant_config") or {}
    for theirs, ours in _TENSORS.items():
        if layer.get(theirs):
            place = f"global_quant_config.{theirs}"
            found[ours] = _spec(layer[theirs], ours, place, problems)
    if layer.get("output_tensors"):
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
    if problems:
        raise ConfigError(problems, fix="Change these places by hand")
    return found


def _pass(
    entry: Mapping[str, Any], place: str, found: dict[str, Any], problems: list[Problem]
) -> None:
    kind = str(entry.get("type", "")).removesuffix("Config")
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
    else:
        problems.append(
            Problem(
                place,
                f"{kind or 'an entry without type'} is unknown: known are Preprocess, "
                "ActivationEqualization, GPTQ, GPFQ, GPFA2Q, BiasCorrection, CalibrateBatchNorm",
            )
        )


def _spec(tensor: Mapping[str, Any], role: str, place: str, problems: list[Problem]) -> str:
    bits, symmetric = tensor.get("bit_width", 8), tensor.get("symmetric", True)
    granularity = str(tensor.get("qscheme", "per_tensor")).lower().removeprefix("per_")
    scale = str(tensor.get("scale_type", "float")).lower()
    method = str(tensor.get("param_type", "stats")).lower()
    if scale not in _SCALES:
        problems.append(
            Problem(f"{place}.scale_type", f"{scale!r} is unknown: known are float and pof2")
        )
    if "float" in str(tensor.get("quant_type", "int_quant")).lower():
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
