"""``tosa``: the integer program, run on TOSA's reference model and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quark_core.errors import ExportError
from quark_pt2e.lowering import edge, reporting
from quark_pt2e.lowering.stages import Comparison, Probe, compare
from quark_pt2e.model import Pt2eModel


def export(model: Pt2eModel, path: Path) -> Path:
    """Write the TOSA programs into the folder ``path``, with the comparison as a report.

    Raises:
        ExportError: Nothing can be lowered to TOSA.
    """
    lowered = lower(model, model.export_program())
    parts = edge.delegates(lowered)
    if not parts:
        raise ExportError(
            "no part of the model is integer arithmetic that TOSA has",
            where="export tosa",
            fix="Quantize more layers: `quark plan` shows what stays float",
        )
    path.mkdir(parents=True)
    for index, part in enumerate(parts):
        (path / f"part{index}.tosa").write_bytes(part.processed_bytes)
    facts = {"TOSA programs": str(len(parts)), "left to the CPU": words(edge.outside(lowered))}
    found = check(model, lowered)
    reporting.write(
        path,
        "TOSA reference model",
        {**facts, **found.facts("integer")},
        found.tables("integer"),
        found.metrics("integer"),
    )
    return path


def check(model: Pt2eModel, lowered: Any) -> Comparison:
    """Float, fake-quantized and integer model on evaluation samples.

    Args:
        model: The quantized model.
        lowered: Its edge program.
    """
    probe = Probe(model)
    observed = lower(model, probe.program(model.sample))
    if edge.outside(observed) != edge.outside(lowered):
        # Looking into the program changed what is integer in it: only its outputs are told.
        probe, observed = Probe(model, layers=False), lowered
    return compare(model, probe, edge.IntegerProgram(observed), model.config.check_samples)


def lower(model: Pt2eModel, program: Any) -> Any:
    """The edge program with its integer parts as TOSA for the configured device."""
    from executorch.backends.arm.tosa.compile_spec import TosaCompileSpec
    from executorch.backends.arm.tosa.partitioner import TOSAPartitioner

    from quark_pt2e.backends.devices import compile_spec, with_passes

    config: Any = model.config
    spec = TosaCompileSpec(compile_spec(config).tosa_spec)
    return edge.lower(program, TOSAPartitioner(with_passes(spec, config)))


def words(found: dict[str, int]) -> str:
    """Operations and how often, in one line."""
    return ", ".join(f"{count} {name}" for name, count in sorted(found.items())) or "nothing"
