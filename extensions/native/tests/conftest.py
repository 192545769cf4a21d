from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

# Triton reads it when it is imported; its kernels then take CPU tensors, if they are forced.
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

FOLDER = Path(__file__).resolve().parent / "golden"

settings.register_profile("native", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("native")


@cache
def _load(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(values) for key, values in file.items()}


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Tensor]]:
    """Golden vectors by file: ``golden("formats")["mx|mxint8|ties"]``."""
    return _load


@pytest.fixture(scope="session")
def same() -> Callable[[Tensor, Tensor], bool]:
    """Whether all values are equal, NaN equal to NaN, -0 equal to +0."""

    def compare(found: Tensor, expected: Tensor) -> bool:
        both_nan = found.isnan() & expected.isnan()
        return found.shape == expected.shape and bool(((found == expected) | both_nan).all())

    return compare


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
