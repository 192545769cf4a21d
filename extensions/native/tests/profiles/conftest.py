"""Compares outputs with the digests of what other libraries returned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FULL = Path(__file__).resolve().parents[5] / "shared" / "golden" / "formats"
"""The outputs themselves, where they lie beside the repository."""
NAN = 0x7FC00000
SHOWN = 5

Check = Callable[[str, str, Tensor], None]


@cache
def _inputs() -> dict[str, Tensor]:
    with np.load(GOLDEN / "profiles_formats.npz") as file:
        return {key: torch.from_numpy(values) for key, values in file.items()}


@cache
def _digests() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads((GOLDEN / "profiles_formats.json").read_text())
    return found


def _digest(values: Tensor) -> str:
    if values.dtype == torch.float32:
        bits = (values + 0.0).view(torch.int32)
        values = torch.where(values.isnan(), NAN, bits).to(torch.int32)
    return hashlib.blake2b(values.contiguous().numpy().tobytes(), digest_size=8).hexdigest()


def _differences(file: str, key: str, found: Tensor) -> str:
    path = FULL / f"{file}.npz"
    if not path.exists():
        return ""
    expected = torch.from_numpy(np.load(path)[key])
    if expected.shape != found.shape:
        return f": shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    wrong = (found != expected) & ~(found.isnan() & expected.isnan())
    x = next((x for name, x in _inputs().items() if name in key.split("|")), found)
    lines = [f": {int(wrong.sum())} of {wrong.numel()} differ"]
    for place in wrong.nonzero()[:SHOWN].tolist():
        at = tuple(place)
        origin = f"input {x[at].item()!r}, " if x.shape == found.shape else ""
        lines.append(f"{at}: {origin}found {found[at].item()!r}, expected {expected[at].item()!r}")
    return "\n".join(lines)


@pytest.fixture(scope="session")
def inputs() -> dict[str, Tensor]:
    """The inputs by name."""
    return _inputs()


@pytest.fixture(scope="session")
def check() -> Check:
    """``check(file, key, found)`` fails unless found equals the library's output."""

    def compare(file: str, key: str, found: Tensor) -> None:
        if _digest(found) != _digests()[file][key]:
            pytest.fail(f"{file} {key}{_differences(file, key, found)}", pytrace=False)

    return compare
