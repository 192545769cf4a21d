"""``vulkan``: a .pte for GPUs. Nothing here can run it, so that only its make-up is told."""

from __future__ import annotations

import logging
from pathlib import Path

from quark_core.errors import ExportError
from quark_pt2e.lowering import edge, reporting
from quark_pt2e.lowering.tosa import words
from quark_pt2e.model import Pt2eModel


def export(model: Pt2eModel, path: Path) -> Path:
    """Write ``model.pte`` into the folder ``path``, with a report of what it is made of.

    Raises:
        ExportError: Vulkan takes no part of the model.
    """
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    level = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        lowered = edge.lower(model.export_program(), VulkanPartitioner())
    finally:
        logging.disable(level)
    parts, left = edge.delegates(lowered), edge.outside(lowered)
    if not parts:
        raise ExportError(
            "Vulkan takes no part of the model",
            where="export vulkan",
            fix="`quark plan` shows what stays float",
        )
    buffer = lowered.to_executorch().buffer
    path.mkdir(parents=True)
    (path / "model.pte").write_bytes(buffer)
    facts = {
        "Vulkan parts": str(len(parts)),
        "left to portable operators": words(left),
        ".pte bytes": str(len(buffer)),
        "compared": "not here: ExecuTorch's Python runtime has no Vulkan",
    }
    metrics = {
        "Vulkan parts": len(parts),
        "operations left": sum(left.values()),
        ".pte bytes": len(buffer),
    }
    reporting.write(path, "Vulkan", facts, [], metrics)
    return path
