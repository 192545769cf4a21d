"""ONNX files: written by Brevitas over torch's exporter, run by onnxruntime and onnx."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quark_brevitas.onnx_symbols import OPSET, symbols
from quark_brevitas.subject import Call, Subject
from quark_core.errors import ExportError

LARGEST = 2**31 - 1
"""Bytes of an ONNX file, which is one protobuf message."""


def write_qcdq(subject: Subject, path: Path, batched: bool) -> None:
    """Write pairs of quantize and dequantize nodes.

    Args:
        subject: What is exported.
        path: The file.
        batched: Whether any number of samples will do.

    Raises:
        ExportError: The tensors are larger than a file can be.
    """
    from brevitas.export import export_onnx_qcdq

    _write(export_onnx_qcdq, subject, path, batched, _size(subject, code_bytes=1))


def write_qonnx(subject: Subject, path: Path, batched: bool) -> None:
    """Write QONNX's nodes, which keep float weights; otherwise as :func:`write_qcdq`."""
    from brevitas.export import export_qonnx

    _write(export_qonnx, subject, path, batched, _size(subject, code_bytes=None))


def run_qcdq(path: Path, call: Call) -> dict[str, Tensor]:
    """What onnxruntime makes of a file, without and with its integer kernels."""
    return {
        "sqnr_db": _run(path, call.inputs, fused=False),
        "fused_sqnr_db": _run(path, call.inputs, fused=True),
    }


def run_qonnx(path: Path, call: Call) -> dict[str, Tensor]:
    """What onnx's own evaluator makes of a file."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(str(path))
    known = {value.name for value in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in known]
    feed = {name: value.numpy() for name, value in zip(names, call.inputs, strict=True)}
    found: Any = ReferenceEvaluator(model, new_ops=[_quant_operator()]).run(None, feed)
    return {"sqnr_db": torch.from_numpy(found[0])}


def _write(
    exporter: Callable[..., Any], subject: Subject, path: Path, batched: bool, size: int
) -> None:
    if size > LARGEST:
        raise ExportError(
            f"the model's tensors take {size / 1e9:.1f} GB, an ONNX file holds "
            f"{LARGEST / 1e9:.1f} GB",
            where=f"export {subject.name}",
            fix="Use pt2 or checkpoint",
        )
    call = subject.traced(batched)
    names = call.input_names(subject.module)
    axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in [*names, "output"]}
    # torch's newer exporter refuses quantized biases, and gains nothing otherwise.
    with symbols():
        exporter(
            call.positional(subject.copy()),
            args=call.inputs,
            export_path=str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=names,
            output_names=["output"],
            dynamic_axes=axes if batched else None,
        )


def _size(subject: Subject, code_bytes: int | None) -> int:
    """Bytes of all tensors, those of quantized weights as codes of so many bytes."""
    layers = [module for module in subject.module.modules() if hasattr(module, "weight_quant")]
    weights = {layer.get_parameter("weight").data_ptr() for layer in layers}
    sizes = {}
    for tensor in subject.module.state_dict().values():
        coded = code_bytes is not None and tensor.data_ptr() in weights
        each = code_bytes if coded and code_bytes else tensor.element_size()
        sizes[tensor.data_ptr()] = tensor.numel() * each
    return sum(sizes.values())


def _run(path: Path, inputs: tuple[Any, ...], *, fused: bool) -> Tensor:
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
