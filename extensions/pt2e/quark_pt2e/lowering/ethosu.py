"""``ethos-u``: a .pte for each device through Vela, with Vela's figures."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

from quark_core.errors import ExportError
from quark_pt2e.lowering import edge, reporting, tosa, vela
from quark_pt2e.model import Pt2eModel


def export(model: Pt2eModel, path: Path) -> Path:
    """Write ``DEVICE.pte`` for each configured device into the folder ``path``.

    Beside it stand Vela's summary as it printed it, and a report with its figures.

    Raises:
        MissingDependencyError: Vela is not installed.
        ExportError: Nothing can be lowered, or Vela refuses it.
    """
    vela.require()
    config: Any = model.config
    program = model.export_program()
    rows, facts, files = [], {}, {}
    metrics: dict[str, float] = {}
    for target in (config.target, *config.more_targets):
        buffer, printed, figures, left = _compile(model, program, target)
        files[f"{target}.pte"] = buffer
        files[f"{target}.vela.txt"] = printed.encode()
        rows.append((target, *(figures[name] for name in vela.COLUMNS), len(buffer)))
        measured = {**figures, ".pte bytes": len(buffer)}
        metrics |= {f"{target} {name}": float(value) for name, value in measured.items()}
        facts[f"left to the CPU, {target}"] = tosa.words(left)
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    columns = ("device", *vela.COLUMNS, ".pte bytes")
    estimate = reporting.table("Vela's estimate", columns, rows)
    reporting.write(path, "Vela", facts, [estimate], metrics)
    return path


def _compile(
    model: Pt2eModel, program: Any, target: str
) -> tuple[bytes, str, dict[str, Any], dict[str, int]]:
    """The program for one device, what Vela printed, its figures, what stays on the CPU."""
    from executorch.backends.arm.ethosu import EthosUPartitioner

    from quark_pt2e.backends.devices import ethosu_spec, with_passes

    config: Any = model.config
    printed = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="quark-vela-", dir=vela.plain_folder()) as work:
        spec = with_passes(ethosu_spec(config, target), config)
        spec.dump_intermediate_artifacts_to(work)
        with contextlib.redirect_stdout(printed):
            lowered = edge.lower(program, EthosUPartitioner(spec))
            parts = edge.delegates(lowered)
            if not parts:
                raise ExportError(
                    f"no part of the model can run on {target}",
                    where="export ethos-u",
                    fix="Quantize more layers: `quark plan` shows what stays float",
                )
            left = edge.outside(lowered)
            buffer = lowered.to_executorch().buffer
            figures = vela.figures(Path(work), list(spec.compiler_flags), len(parts))
    figures |= vela.operators(printed.getvalue(), len(parts))
    return buffer, printed.getvalue(), figures, left
