"""Looking inside a lowered program: a second one that also returns what its layers yield.

The program that ships returns only its outputs, and its runtime lets nobody in. A second program
made the same way, with the layers' outputs as further outputs, does; whether looking has changed
anything is told by comparing the outputs that both have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from quark_core.errors import QuarkError
from quark_pt2e.lowering.reporting import table
from quark_pt2e.lowering.stages import Comparison, Probe, Run, compare, ratio, samples
from quark_pt2e.model import Pt2eModel

_COMPARED = 16
_LOOKED_INTO = 32
"""Samples whose layers are compared: each has thousands of numbers to tell by."""


@dataclass
class Inside:
    """What was found inside a lowered program.

    Attributes:
        facts: Whether the second program computes the outputs of the first, or why there is none.
        tables: SQNR and differences of codes by layer.
    """

    facts: dict[str, str] = field(default_factory=dict)
    tables: list[dict[str, Any]] = field(default_factory=list)


def inside(model: Pt2eModel, shipped: Run, make: Callable[[Probe], Run], stage: str) -> Inside:
    """Compare a model's layers with those of its lowered program.

    Args:
        model: The quantized model.
        shipped: Runs the program that ships.
        make: Lowers a graph the same way.
        stage: What the lowered program is called in tables.
    """
    probe = Probe(model)
    outputs = len(Probe(model, layers=False).names)
    if len(probe.names) == outputs:
        return Inside()
    try:
        run = make(probe)
        found = compare(model, probe, run, min(_LOOKED_INTO, model.config.check_samples))
    except (QuarkError, RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()
        return Inside({"layers": f"not compared: {reason[0][:120] if reason else error!r}"})
    same = _same(model, shipped, run, outputs)
    rows = [row for row in found.tables(stage)[0]["rows"] if row[0] in probe.names[outputs:]]
    columns = found.tables(stage)[0]["columns"]
    layers = table(f"layers: float, fake-quant, {stage}", columns, rows)
    facts = {
        "samples whose layers were compared": str(found.samples),
        "program with layers as outputs": same,
        "furthest layer": _furthest(found, probe, outputs),
    }
    return Inside(facts, [layers])


def _same(model: Pt2eModel, shipped: Run, run: Run, outputs: int) -> str:
    signal = noise = 0.0
    for sample, _ in islice(samples(model, _COMPARED), _COMPARED):
        for one, other in zip(shipped(sample), run(sample)[:outputs], strict=True):
            signal += float(one.double().square().sum())
            noise += float((one.double() - other.double().reshape(one.shape)).square().sum())
    found = ratio(signal, noise)
    return "same outputs" if found == "equal" else f"outputs {found} dB from those that ship"


def _furthest(found: Comparison, probe: Probe, outputs: int) -> str:
    largest, name = max((found.tallies[name].largest, name) for name in probe.names[outputs:])
    return f"{name}, {largest} LSB"
