"""``xnnpack``: a .pte, run in ExecuTorch's runtime and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quark_core.batch import Batch, leaves
from quark_core.errors import ExportError
from quark_pt2e.lowering import edge, reporting
from quark_pt2e.lowering.stages import Probe, compare
from quark_pt2e.lowering.tosa import words
from quark_pt2e.model import Pt2eModel


def export(model: Pt2eModel, path: Path) -> Path:
    """Write ``model.pte`` into the folder ``path``, with the comparison as a report.

    Raises:
        ExportError: XNNPACK takes no part of the model.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    lowered = edge.lower(model.export_program(), XnnpackPartitioner())
    parts, left = edge.delegates(lowered), edge.outside(lowered)
    if not parts:
        raise ExportError(
            "XNNPACK takes no part of the model",
            where="export xnnpack",
            fix="Quantize linear layers or convolutions: `quark plan` shows what stays float",
        )
    buffer = lowered.to_executorch().buffer
    found = compare(model, Probe(model, layers=False), Runtime(buffer), model.config.check_samples)
    path.mkdir(parents=True)
    (path / "model.pte").write_bytes(buffer)
    facts = {
        "XNNPACK parts": str(len(parts)),
        "left to portable operators": words(left),
        ".pte bytes": str(len(buffer)),
    }
    reporting.write(
        path,
        "XNNPACK runtime",
        {**facts, **found.facts("runtime")},
        found.tables("runtime"),
        {**found.metrics("runtime"), ".pte bytes": len(buffer)},
    )
    return path


class Runtime:
    """A .pte in ExecuTorch's own runtime."""

    def __init__(self, buffer: bytes) -> None:
        import executorch.kernels.quantized  # noqa: F401 (registers operators)
        from executorch.runtime import Runtime as Theirs

        # Kept: the method reads from the program.
        self._program = Theirs.get().load_program(buffer)
        self._method: Any = self._program.load_method("forward")

    def __call__(self, batch: Batch) -> list[torch.Tensor]:
        """The outputs for one sample."""
        found = self._method.execute([leaf.contiguous() for leaf in batch.tensors()])
        return [leaf.clone() for leaf in leaves(list(found))]
