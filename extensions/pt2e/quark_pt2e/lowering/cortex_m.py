"""``cortex-m``: a .pte of CMSIS-NN kernels, compared through their reference arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quark_core.batch import Batch, leaves
from quark_core.errors import ExportError
from quark_pt2e.lowering import reporting
from quark_pt2e.lowering.layers import inside
from quark_pt2e.lowering.stages import Probe, Run, compare
from quark_pt2e.lowering.tosa import words
from quark_pt2e.model import Pt2eModel


def export(model: Pt2eModel, path: Path) -> Path:
    """Write ``model.pte`` into the folder ``path``, with the comparison as a report.

    ExecuTorch has each kernel's integer arithmetic in Python too; that is what is compared.

    Raises:
        ExportError: No operation becomes a Cortex-M kernel, or ExecuTorch refuses one.
    """
    lowered = _lower(model.export_program())
    kernels, rest = _operations(lowered)
    if not kernels:
        raise ExportError(
            "no operation of the model becomes a Cortex-M kernel",
            where="export cortex-m",
            fix="Quantize more layers: `quark plan` shows what stays float",
        )
    run = _running(lowered)
    found = compare(model, Probe(model, layers=False), run, model.config.check_samples)
    inner = inside(
        model, run, lambda probe: _running(_lower(probe.program(model.sample))), "integer"
    )
    buffer = _program(lowered)
    path.mkdir(parents=True)
    (path / "model.pte").write_bytes(buffer)
    facts = {
        "Cortex-M kernels": words(kernels),
        "left to portable operators": words(rest),
        ".pte bytes": str(len(buffer)),
    }
    reporting.write(
        path,
        "Cortex-M kernels",
        {**facts, **found.facts("integer"), **inner.facts},
        [*found.tables("integer"), *inner.tables],
        {
            **found.metrics("integer"),
            "kernels": sum(kernels.values()),
            "operations left": sum(rest.values()),
            ".pte bytes": len(buffer),
        },
    )
    return path


def _lower(program: torch.export.ExportedProgram) -> Any:
    """The program with quantized operations as calls of Cortex-M kernels.

    Raises:
        ExportError: ExecuTorch refuses it.
    """
    from executorch.backends.cortex_m.edge_compile_config import cortex_m_edge_compile_config
    from executorch.backends.cortex_m.passes.cortex_m_pass_manager import CortexMPassManager
    from executorch.exir import to_edge

    try:
        edge = to_edge(program, compile_config=cortex_m_edge_compile_config())
        return CortexMPassManager(edge.exported_program()).transform()
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise ExportError(
            "ExecuTorch cannot turn the model into Cortex-M kernels",
            where="export cortex-m",
            cause=f"{type(error).__name__}: {lines[0][:200] if lines else ''}",
            fix="Leave the layers it names in float by a rule",
        ) from error


def _program(lowered: Any) -> bytes:
    from executorch.backends.cortex_m.edge_compile_config import cortex_m_edge_compile_config
    from executorch.exir import EdgeProgramManager

    manager = EdgeProgramManager(
        {"forward": lowered}, compile_config=cortex_m_edge_compile_config()
    )
    buffer: bytes = manager.to_executorch().buffer
    return buffer


def _operations(lowered: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Kernels, and operations of another kind, each with how often it occurs."""
    kernels: dict[str, int] = {}
    rest: dict[str, int] = {}
    for node in lowered.graph_module.graph.nodes:
        name = getattr(getattr(node.target, "_op", None), "_name", "")
        if node.op == "call_function" and name:
            space, _, short = name.partition("::")
            found = kernels if space == "cortex_m" else rest
            found[short] = found.get(short, 0) + 1
    return kernels, rest


def _running(lowered: Any) -> Run:
    import executorch.backends.cortex_m.ops.operators  # noqa: F401 (registers the kernels)

    program: Any = lowered.module()

    def run(sample: Batch) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(leaves(sample.run(program)))

    return run
