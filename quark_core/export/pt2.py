"""``pt2``: the model as a torch.export program, proven by loading it again."""

from __future__ import annotations

from pathlib import Path

from quark_core.batch import Batch, leaves
from quark_core.errors import ExportError
from quark_core.quantized import QuantizedModel


def export(quantized: QuantizedModel, path: Path, example: Batch | None) -> Path:
    """Export for the example's shapes, save to ``path``, load and compare the outputs.

    Raises:
        ExportError: There is no example, torch.export refuses the model, or the loaded program
            computes something else.
    """
    import torch

    if example is None:
        raise ExportError(
            "pt2 needs an example batch", where="export", fix="Give data.calibration or evaluation"
        )
    try:
        with torch.no_grad():
            program = torch.export.export(
                quantized.module, tuple(example.args), dict(example.kwargs), strict=False
            )
        torch.export.save(program, path)
    except Exception as error:
        path.unlink(missing_ok=True)
        raise ExportError(
            "torch.export refuses the quantized model",
            where="export pt2",
            cause=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}",
            fix="Use checkpoint, or one of the backend's own forms",
        ) from error
    with torch.no_grad():
        expected = list(leaves(example.run(quantized.module)))
        found = list(leaves(example.run(torch.export.load(path).module())))
    if len(found) != len(expected) or not all(
        torch.equal(a, b) for a, b in zip(expected, found, strict=True)
    ):
        path.unlink()
        raise ExportError(
            "the exported program computes something else than the module", where="export pt2"
        )
    return path
