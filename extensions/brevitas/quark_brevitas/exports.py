"""Files in Brevitas's export formats, each proven by running it before it is kept."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quark_brevitas.preparation import quiet
from quark_core.batch import Batch, main_output
from quark_core.errors import ExportError, MissingDependencyError
from quark_core.plan import Plan

_ENOUGH = 60.0
"""dB by which a file's output must equal the module's; sums in another order give 100 or more."""
_PERFECT = 300.0
_WIDEST = 8


def export(name: str, module: nn.Module, plan: Plan, example: Batch | None, path: Path) -> Path:
    """Write a quantized module, run the file, and compare.

    Beside the file lies a JSON file with the measured signal to noise.

    Args:
        name: ``onnx_qcdq``, ``qonnx`` or ``torch_qcdq``.
        module: Brevitas's module; stays as it is.
        plan: What was carried out.
        example: One batch to trace and compare with.
        path: Where to write, without an ending.

    Raises:
        ExportError: The plan has tensors the format cannot hold, there is no example, or the
            file computes something else than the module; nothing is left behind.
        MissingDependencyError: A package that writes or runs the file is missing.
    """
    write, suffix = _WRITERS[name]
    inputs = _inputs(example, name)
    _require_fitting(plan, name)
    target = path.with_name(path.name + suffix)
    with torch.no_grad(), quiet(), _quiet_tracer():
        expected = main_output(module(*inputs))
        try:
            found = write(copy.deepcopy(module), inputs, target)
            figures = {key: round(_sqnr(expected, value), 1) for key, value in found.items()}
            if figures["sqnr_db"] < _ENOUGH:
                raise ExportError(
                    f"the {name} file computes something else than the module",
                    where=f"export {name}",
                    cause=f"signal to noise {figures['sqnr_db']} dB, at least {_ENOUGH:g} wanted",
                    fix="Use checkpoint, or another of the backend's forms",
                )
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    about: dict[str, Any] = {"format": name, **figures}
    if figures.get("fused_sqnr_db", _PERFECT) < _ENOUGH:
        about["note"] = (
            "onnxruntime's fused integer kernels differ on this processor; set the session option "
            "session.disable_quant_qdq to 1 for the module's own numbers"
        )
    text = json.dumps(about, indent=1) + "\n"
    path.with_name(path.name + ".json").write_text(text, encoding="utf-8")
    return target


def _inputs(example: Batch | None, name: str) -> tuple[Any, ...]:
    if example is None:
        raise ExportError(
            f"{name} needs an example batch",
            where=f"export {name}",
            fix="Give data.calibration, and quantize anew if the model was loaded",
        )
    if example.kwargs or not all(isinstance(value, Tensor) for value in example.args):
        raise ExportError(
            f"{name} holds models that are called with tensors by position",
            where=f"export {name}",
            fix="Wrap the model so that its inputs are positional, or use checkpoint",
        )
    return example.args


def _require_fitting(plan: Plan, name: str) -> None:
    """Refuse what Brevitas's exporters answer with an obscure error."""
    for entry in plan.quantized:
        for role, spec in entry.specs.items():
            fmt, problem = spec.number_format, ""
            if fmt.family != "integer":
                problem = f"{fmt.name}: it holds integers only"
            elif spec.dynamic:
                problem = "a dynamic scale: it holds static ones only"
            elif spec.granularity is not None and spec.granularity.kind == "group":
                problem = "groups: it holds one scale a tensor or channel"
            elif role != "bias" and fmt.bits > _WIDEST:
                problem = f"{fmt.bits} bits: it holds at most {_WIDEST}"
            if problem:
                raise ExportError(
                    f"{name} cannot hold {problem}",
                    where=f"export {name}, tensor {entry.name}.{role}",
                    fix="Use checkpoint or encodings, or int8 specs",
                )


def _onnx_qcdq(module: nn.Module, inputs: tuple[Any, ...], path: Path) -> dict[str, Tensor]:
    from brevitas.export import export_onnx_qcdq

    _require("onnx", "onnxruntime", "onnxoptimizer")
    # The other exporter refuses quantized biases, and gains nothing otherwise.
    export_onnx_qcdq(module, args=inputs, export_path=str(path), dynamo=False, opset_version=17)
    return {
        "sqnr_db": _run_onnx(path, inputs, fused=False),
        "fused_sqnr_db": _run_onnx(path, inputs, fused=True),
    }


def _run_onnx(path: Path, inputs: tuple[Any, ...], *, fused: bool) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not fused:
        # Otherwise quantized convolutions become integer kernels, which saturate in between on
        # processors without VNNI: the file is right, but its output is not the module's.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def _qonnx(module: nn.Module, inputs: tuple[Any, ...], path: Path) -> dict[str, Tensor]:
    from brevitas.export import export_qonnx

    _require("onnx", "onnxoptimizer")
    import onnx
    from onnx.reference import ReferenceEvaluator

    export_qonnx(module, args=inputs, export_path=str(path), dynamo=False, opset_version=17)
    model = onnx.load(str(path))
    known = {value.name for value in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in known]
    feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    found: Any = ReferenceEvaluator(model, new_ops=[_quant_operator()]).run(None, feed)
    return {"sqnr_db": torch.from_numpy(found[0])}


def _quant_operator() -> Any:
    """QONNX's Quant for onnx's own evaluator, as its definition has it.

    q = clamp(round(x / scale + zero point)), and the value is (q - zero point) * scale.
    """
    import numpy
    from onnx.reference.op_run import OpRun

    class Quant(OpRun):  # type: ignore[misc]
        op_domain = "qonnx.custom_op.general"

        def _run(
            self,
            x: Any,
            scale: Any,
            zero_point: Any,
            bits: Any,
            signed: int,
            narrow: int,
            rounding_mode: str,
        ) -> tuple[Any]:
            assert str(rounding_mode) == "ROUND"
            low = -(2.0 ** (bits - 1)) + narrow if signed else 0.0 * bits
            high = 2.0 ** (bits - 1) - 1 if signed else 2.0**bits - 1 - narrow
            codes = numpy.clip(numpy.round(x / scale + zero_point), low, high)
            return (((codes - zero_point) * scale).astype(x.dtype),)

    return Quant


def _torch_qcdq(module: nn.Module, inputs: tuple[Any, ...], path: Path) -> dict[str, Tensor]:
    from brevitas.export import export_torch_qcdq

    export_torch_qcdq(module, args=inputs, export_path=str(path))
    loaded = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    return {"sqnr_db": main_output(loaded(*inputs))}


_Writer = Callable[[nn.Module, tuple[Any, ...], Path], dict[str, Tensor]]
_WRITERS: dict[str, tuple[_Writer, str]] = {
    "onnx_qcdq": (_onnx_qcdq, ".onnx"),
    "qonnx": (_qonnx, ".onnx"),
    "torch_qcdq": (_torch_qcdq, ".pt"),
}


def _require(*packages: str) -> None:
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            f"the export needs {', '.join(missing)}",
            where="export",
            fix=f"pip install {' '.join(missing)}",
        )


def _sqnr(expected: Tensor, found: Tensor) -> float:
    noise = (expected - found).double().square().sum()
    if noise == 0:
        return _PERFECT
    return float(10 * torch.log10(expected.double().square().sum() / noise))


@contextmanager
def _quiet_tracer() -> Iterator[None]:
    """Hold back the exporters' own progress lines."""
    import logging

    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
