"""``encodings``: every scale and zero point, readable without the backend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quark_core.batch import Batch
from quark_core.quantized import Encoding, QuantizedModel

if TYPE_CHECKING:
    import torch

_INLINE = 4096
"""Longer scale tensors go beside the JSON: a language model has millions of scales."""
_NUMBERS = ("scale", "zero_point", "min", "max")


def export(quantized: QuantizedModel, path: Path, example: Batch | None) -> Path:
    """Write the encodings as JSON to ``path``, long tensors beside it."""
    write_encodings(quantized, path.parent, path.stem)
    return path


def write_encodings(quantized: QuantizedModel, folder: Path, stem: str = "encodings") -> None:
    """Write ``stem``.json, and ``stem``.safetensors if some tensor is long."""
    import json

    from safetensors.torch import save_file

    long: dict[str, torch.Tensor] = {}
    rows = [_row(encoding, long, f"{stem}.safetensors") for encoding in quantized.encodings()]
    text = json.dumps({"encodings": rows}, indent=1)
    (folder / f"{stem}.json").write_text(text + "\n", encoding="utf-8")
    if long:
        save_file(long, folder / f"{stem}.safetensors")


def _row(encoding: Encoding, long: dict[str, torch.Tensor], file: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "tensor": encoding.tensor,
        "layer": encoding.layer,
        "role": encoding.role,
        "format": encoding.format,
        "granularity": encoding.granularity,
        "axis": encoding.axis,
        "symmetric": encoding.symmetric,
        "dynamic": encoding.dynamic,
        "scale_format": encoding.scale_format,
    }
    for name in _NUMBERS:
        value = getattr(encoding, name)
        if value is not None and value.numel() > _INLINE:
            key = f"{encoding.tensor}.{name}"
            long[key] = value.detach().cpu().contiguous()
            row[name] = {"file": file, "key": key}
        else:
            row[name] = None if value is None else value.detach().cpu().tolist()
    return row
