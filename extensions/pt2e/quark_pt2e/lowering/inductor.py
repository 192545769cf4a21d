"""``inductor``: torch.compile's int8 kernels, compared and timed against float."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quark_core.batch import Batch, as_batch, leaves
from quark_core.errors import ExportError
from quark_pt2e.lowering import reporting
from quark_pt2e.lowering.stages import Probe, compare
from quark_pt2e.model import Pt2eModel

_TIMED_SAMPLES = 32
_REPEATS = 10


def export(model: Pt2eModel, path: Path) -> Path:
    """Write ``program.pt2`` into the folder ``path``, with accuracy and speed as a report.

    The program is what torch.compile is given; compiled code itself belongs to the process and
    the machine it was made in.

    Raises:
        ExportError: torch.compile fails, for instance for want of a C++ compiler.
    """
    batch = _timed_batch(model)
    try:
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):
            # Inductor's int8 patterns are matched for one shape at a time.
            compiled: Any = torch.compile(model.graph, dynamic=False)
            found = compare(
                model,
                Probe(model, layers=False),
                lambda sample: list(leaves(sample.run(compiled))),
                model.config.check_samples,
            )
            rows = [("int8 compiled", _milliseconds(lambda: batch.run(compiled)))]
            if model.float_model is not None:
                beside = batch.beside(model.float_model)
                plain: Any = torch.compile(model.float_model, dynamic=False)
                rows.append(("float compiled", _milliseconds(lambda: beside.run(plain))))
                eager = model.float_model
                rows.append(("float eager", _milliseconds(lambda: beside.run(eager))))
    except Exception as error:
        raise ExportError(
            "torch.compile refuses the quantized graph",
            where="export inductor",
            cause=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}",
            fix="It needs a C++ compiler; if there is one, report it to torch",
        ) from error
    path.mkdir(parents=True)
    torch.export.save(model.export_program(), path / "program.pt2")
    base = rows[0][1]
    timing = reporting.table(
        f"time of {len(batch)} samples, {torch.get_num_threads()} threads",
        ("program", "ms", "of int8"),
        [(name, ms, f"{ms / base:.2f}") for name, ms in rows],
    )
    speed = {f"{name} ms": ms for name, ms in rows}
    if len(rows) > 1:
        speed["speedup over float compiled"] = rows[1][1] / base
    reporting.write(
        path,
        "Inductor",
        found.facts("compiled"),
        [timing, *found.tables("compiled")],
        {**found.metrics("compiled"), **speed},
    )
    return path


def _timed_batch(model: Pt2eModel) -> Batch:
    if model.evaluation is not None and model.module.samples is None:
        for item in model.evaluation:
            return as_batch(item).map(lambda leaf: leaf[:_TIMED_SAMPLES] if leaf.ndim else leaf)
    return model.sample


def _milliseconds(run: Callable[[], Any]) -> float:
    """Shortest of several runs; the first ones compile and warm up."""
    for _ in range(3):
        run()
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best * 1000
