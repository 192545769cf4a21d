"""``checkpoint``: what the backend saves, in the form it loads again."""

from __future__ import annotations

from pathlib import Path

from quark_core.batch import Batch
from quark_core.quantized import QuantizedModel


def export(quantized: QuantizedModel, path: Path, example: Batch | None) -> Path:
    """Save the model into the folder ``path``."""
    path.mkdir(parents=True)
    quantized.save(path)
    return path
