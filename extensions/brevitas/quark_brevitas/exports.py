"""Files in Brevitas's export formats, each proven by running it before it is kept."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quark_brevitas.onnx_masks import OPSET, masks
from quark_brevitas.preparation import quiet
from quark_core.batch import Batch, main_output
from quark_core.errors import ExportError, MissingDependencyError
from quark_core.export import report_file
from quark_core.plan import Plan

_ENOUGH = 60.0
"""dB by which a file's output must equal the module's; sums in another order give 100 or more."""
_HALF_PRECISION = 45.0
"""The same where scales are stored as float16, whose rounding alone leaves 60 to 70 dB."""
_PERFECT = 300.0
_WIDEST = 8


def export(name: str, module: nn.Module, plan: Plan, example: Batch | None, path: Path) -> Path:
    """Write a quantized module, run the file, and compare.

    Beside the file lies a report with the measured signal to noise.

    Args:
        name: ``onnx_qcdq``, ``qonnx``, ``torch_qcdq``, ``pt2`` or ``gguf``.
        module: Brevitas's module; stays as it is.
        plan: What was carried out.
        example: One batch to trace and compare with; its first sample is used.
        path: Where to write, without an ending.

    Raises:
        ExportError: The plan has tensors the format cannot hold, there is no example, or the
            file computes something else than the module; nothing is left behind.
        MissingDependencyError: A package that writes or runs the file is missing.
    """
    form = _FORMS[name]
    _require(*form.packages)
    call = _Call.of(example, name)
    if form.qcdq:
        _require_fitting(plan, name)
    target = path.with_name(path.name + form.suffix)
    with torch.no_grad(), quiet(), _quiet_tracer():
        expected = main_output(call.batch.run(module))
        try:
            found = form.write(copy.deepcopy(module), call, plan, target)
            metrics = {key: round(_sqnr(expected, value), 1) for key, value in found.items()}
            if metrics["sqnr_db"] < form.floor:
                raise ExportError(
                    f"the {name} file computes something else than the module",
                    where=f"export {name}",
                    cause=f"signal to noise {metrics['sqnr_db']} dB, at least {form.floor:g} "
                    "wanted",
                    fix="Use checkpoint, or another of the backend's forms",
                )
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    facts = {"signal to noise against the module": f"{metrics['sqnr_db']:.1f} dB"}
    if metrics.get("fused_sqnr_db", _PERFECT) < _ENOUGH:
        facts["with onnxruntime's fused integer kernels"] = (
            f"{metrics['fused_sqnr_db']:.1f} dB on this processor; the session option "
            "session.disable_quant_qdq: 1 gives the module's own numbers"
        )
    about = {"title": name, "metrics": metrics, "facts": facts}
    text = json.dumps(about, indent=1) + "\n"
    report_file(target).write_text(text, encoding="utf-8")
    return target


@dataclass(frozen=True)
class _Call:
    """How a model is called with one sample.

    Attributes:
        batch: The sample.
        names: Names of the arguments given by keyword, in order, after those by position.
    """

    batch: Batch
    names: tuple[str, ...]

    @classmethod
    def of(cls, example: Batch | None, name: str) -> _Call:
        """The first sample of a batch.

        Raises:
            ExportError: There is no batch, or it holds other things than tensors.
        """
        if example is None:
            raise ExportError(
                f"{name} needs an example batch",
                where=f"export {name}",
                fix="Give data.calibration, and quantize anew if the model was loaded",
            )
        found = cls(example.first(), tuple(example.kwargs))
        if not all(isinstance(value, Tensor) for value in found.inputs):
            raise ExportError(
                f"{name} holds models that are called with tensors",
                where=f"export {name}",
                fix="Wrap the model so that its inputs are tensors, or use checkpoint",
            )
        return found

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """All arguments, those by keyword last."""
        return (*self.batch.args, *(self.batch.kwargs[name] for name in self.names))

    def positional(self, module: nn.Module) -> nn.Module:
        """The module, called by position and with one tensor as its output."""
        if not self.names and isinstance(self.batch.run(module), Tensor):
            return module
        return _Positional(module, len(self.batch.args), self.names)


class _Positional(nn.Module):
    """Calls a module by keyword, and returns its main output."""

    def __init__(self, module: nn.Module, count: int, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self._count, self._names = module, count, names

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the module."""
        named = dict(zip(self._names, inputs[self._count :], strict=True))
        return main_output(self.module(*inputs[: self._count], **named))


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
                    fix="Use pt2, checkpoint or encodings, or int8 specs",
                )


def _write_onnx(exporter: Callable[..., Any], module: nn.Module, call: _Call, path: Path) -> None:
    # torch's newer exporter refuses quantized biases, and gains nothing otherwise.
    with masks():
        exporter(
            call.positional(module),
            args=call.inputs,
            export_path=str(path),
            dynamo=False,
            opset_version=OPSET,
        )


def _onnx_qcdq(module: nn.Module, call: _Call, _plan: Plan, path: Path) -> dict[str, Tensor]:
    from brevitas.export import export_onnx_qcdq

    _write_onnx(export_onnx_qcdq, module, call, path)
    return {
        "sqnr_db": _run_onnx(path, call.inputs, fused=False),
        "fused_sqnr_db": _run_onnx(path, call.inputs, fused=True),
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


def _qonnx(module: nn.Module, call: _Call, _plan: Plan, path: Path) -> dict[str, Tensor]:
    import onnx
    from brevitas.export import export_qonnx
    from onnx.reference import ReferenceEvaluator

    _write_onnx(export_qonnx, module, call, path)
    model = onnx.load(str(path))
    known = {value.name for value in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in known]
    feed = {name: value.numpy() for name, value in zip(names, call.inputs, strict=True)}
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


def _torch_qcdq(module: nn.Module, call: _Call, _plan: Plan, path: Path) -> dict[str, Tensor]:
    from brevitas.export import export_torch_qcdq

    export_torch_qcdq(call.positional(module), args=call.inputs, export_path=str(path))
    loaded = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    return {"sqnr_db": main_output(loaded(*call.inputs))}


def _pt2(module: nn.Module, call: _Call, _plan: Plan, path: Path) -> dict[str, Tensor]:
    from brevitas.export.inference import quant_inference_mode

    with quant_inference_mode(module):
        # The first call fixes the scales, which torch.export could not see through.
        call.batch.run(module)
        program = torch.export.export(
            module, call.batch.args, dict(call.batch.kwargs), strict=False
        )
    torch.export.save(program, path)
    return {"sqnr_db": main_output(call.batch.run(torch.export.load(path).module()))}


def _gguf(module: nn.Module, call: _Call, plan: Plan, path: Path) -> dict[str, Tensor]:
    from quark_brevitas import gguf_file

    gguf_file.write(module, plan, path)
    float_model = gguf_file.read(path, module)
    return {"sqnr_db": main_output(call.batch.run(float_model))}


@dataclass(frozen=True)
class _Form:
    """One form of file.

    Attributes:
        write: Writes the file, and returns what it computes for the call, by metric.
        suffix: Of the file.
        packages: What writing and running it needs.
        qcdq: Whether it holds integers of static scales only.
        floor: dB of signal to noise it must reach.
    """

    write: Callable[[nn.Module, _Call, Plan, Path], dict[str, Tensor]]
    suffix: str
    packages: tuple[str, ...] = ()
    qcdq: bool = True
    floor: float = _ENOUGH


_FORMS: dict[str, _Form] = {
    "onnx_qcdq": _Form(_onnx_qcdq, ".onnx", ("onnx", "onnxruntime", "onnxoptimizer")),
    "qonnx": _Form(_qonnx, ".onnx", ("onnx", "onnxoptimizer")),
    "torch_qcdq": _Form(_torch_qcdq, ".pt"),
    "pt2": _Form(_pt2, ".pt2", qcdq=False),
    "gguf": _Form(_gguf, ".gguf", ("gguf",), qcdq=False, floor=_HALF_PRECISION),
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
