"""``onnx``: an ONNX model with QuantizeLinear and DequantizeLinear, run and compared."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import fx

from quark_core.batch import Batch
from quark_core.errors import ExportError
from quark_pt2e.lowering import reporting
from quark_pt2e.lowering.stages import Probe, compare
from quark_pt2e.lowering.tosa import words
from quark_pt2e.model import Pt2eModel

_OPSET = 21
"""The first in which QuantizeLinear has 16 bits."""


def export(model: Pt2eModel, path: Path) -> Path:
    """Write ``model.onnx`` into the folder ``path``, with the comparison as a report.

    Raises:
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
        ExportError: torch.onnx or onnxruntime refuses the model.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise reporting.missing("What ONNX takes", "quark-pt2e[onnx]", error) from error
    program = model.export_program(dynamic=model.module.samples is None)
    _without_copies(program.graph_module)
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            made: Any = torch.onnx.export(program, dynamo=True, opset_version=_OPSET, verbose=False)
        proto = made.model_proto
        onnx.checker.check_model(proto)
        session = onnxruntime.InferenceSession(proto.SerializeToString())
        found = compare(
            model, Probe(model, layers=False), _Session(session), model.config.check_samples
        )
    except Exception as error:
        lines = str(_deepest(error)).strip().splitlines()
        raise ExportError(
            "the quantized graph does not become an ONNX model",
            where="export onnx",
            cause=lines[0][:300] if lines else type(error).__name__,
            fix="Leave the layers it names in float by a rule, or use pt2",
        ) from error
    path.mkdir(parents=True)
    data = proto.SerializeToString()
    (path / "model.onnx").write_bytes(data)
    operations = Counter(node.op_type for node in proto.graph.node)
    facts = {"operations": words(operations), "bytes": str(len(data))}
    reporting.write(
        path,
        "onnxruntime",
        {**facts, **found.facts("onnxruntime")},
        found.tables("onnxruntime"),
        {**found.metrics("onnxruntime"), "bytes": len(data)},
    )
    return path


def _without_copies(graph: fx.GraphModule) -> None:
    """Arm's passes write ``slice_copy`` and the like, for which torch.onnx knows only ``slice``."""
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            space, _, name = node.target._schema.name.partition("::")
            plain = getattr(getattr(torch.ops, space), name.removesuffix("_copy"), None)
            overload = node.target._overloadname
            if name.endswith("_copy") and overload in getattr(plain, "overloads", list)():
                node.target = getattr(plain, overload)
    graph.recompile()


def _deepest(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


class _Session:
    """An onnxruntime session as the comparison calls programs."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._names = [value.name for value in session.get_inputs()]

    def __call__(self, sample: Batch) -> list[torch.Tensor]:
        arrays = [leaf.numpy() for leaf in sample.tensors()]
        outputs = self._session.run(None, dict(zip(self._names, arrays, strict=True)))
        return [torch.from_numpy(output) for output in outputs]
