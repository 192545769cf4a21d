"""``vgf``: VGF files for Vulkan devices, and the .pte that calls them."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quark_core.errors import ExportError, MissingDependencyError
from quark_pt2e.lowering import edge, reporting
from quark_pt2e.lowering.tosa import words
from quark_pt2e.model import Pt2eModel

_PLACE = "MODEL_CONVERTER_PATH"
_TOOLS = ("model-converter", "model_converter")


def export(model: Pt2eModel, path: Path) -> Path:
    """Write ``partN.vgf`` and ``model.pte`` into the folder ``path``, with a report.

    The TOSA programs are those of the export ``tosa``, which runs and compares them.

    Raises:
        MissingDependencyError: Arm's model converter is not installed.
        ExportError: Nothing can be lowered, or the converter refuses it.
    """
    from executorch.backends.arm.vgf import VgfPartitioner

    from quark_pt2e.backends.devices import compile_spec

    with _converter():
        lowered = edge.lower(
            model.export_program(),
            VgfPartitioner(compile_spec(model.config)),  # type: ignore[arg-type]
        )
    parts = edge.delegates(lowered)
    if not parts:
        raise ExportError(
            "no part of the model can become a VGF program",
            where="export vgf",
            fix="Quantize more layers: `quark plan` shows what stays float",
        )
    left = edge.outside(lowered)
    buffer = lowered.to_executorch().buffer
    path.mkdir(parents=True)
    for index, part in enumerate(parts):
        (path / f"part{index}.vgf").write_bytes(part.processed_bytes)
    (path / "model.pte").write_bytes(buffer)
    sizes = sum(len(part.processed_bytes) for part in parts)
    facts = {
        "VGF programs": str(len(parts)),
        "left to the CPU": words(left),
        "VGF bytes": str(sizes),
        ".pte bytes": str(len(buffer)),
    }
    metrics = {
        "VGF programs": len(parts),
        "operations left to the CPU": sum(left.values()),
        "VGF bytes": sizes,
        ".pte bytes": len(buffer),
    }
    reporting.write(path, "VGF", facts, [], metrics)
    return path


@contextmanager
def _converter() -> Iterator[None]:
    """Tell ExecuTorch where the model converter is: also in an environment that is not active."""
    if os.environ.get(_PLACE) or any(shutil.which(tool) for tool in _TOOLS):
        yield
        return
    scripts = sysconfig.get_path("scripts")
    found = next((tool for name in _TOOLS if (tool := shutil.which(name, path=scripts))), None)
    if found is None:
        raise MissingDependencyError(
            "Arm's model converter is not installed",
            where="export vgf",
            fix="pip install 'quark-pt2e[vgf]', or set MODEL_CONVERTER_PATH to its program",
        )
    os.environ[_PLACE] = found
    try:
        yield
    finally:
        del os.environ[_PLACE]
