"""A small model, data for it, and a recipe, in a folder of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

MODEL = """
import torch

class Net(torch.nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.first = torch.nn.Linear(8, width)
        self.act = torch.nn.ReLU()
        self.last = torch.nn.Linear(width, 4)

    def forward(self, x):
        return self.last(self.act(self.first(x)))

def build(width=16):
    torch.manual_seed(1)
    return Net(width)
"""
RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "small",
    "model": {"source": "python", "factory": "model.py:build"},
    "data": {
        "calibration": {"source": "npz", "path": "data.npz", "input": "x", "batch_size": 8},
        "evaluation": {
            "source": "npz",
            "path": "data.npz",
            "input": "x",
            "target": "y",
            "batch_size": 16,
        },
    },
    "quantizer": {"name": "native", "weight": "int8/channel", "input": "int8"},
    "evaluate": {"metrics": ["accuracy", "sqnr"]},
    "export": ["checkpoint", "encodings"],
}

Write = Callable[..., Path]


def change(recipe: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of nested mappings with one value changed."""
    key, _, rest = path.partition(".")
    inner = change(recipe.get(key) or {}, rest, value) if rest else value
    return {**recipe, key: inner}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with model code and data."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "model.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    np.savez(
        folder / "data.npz",
        x=rng.normal(size=(64, 8)).astype(np.float32),
        y=rng.integers(0, 4, size=64),
    )
    return folder


@pytest.fixture
def recipe(project: Path) -> Write:
    """Writes the recipe, with some values changed, and returns its path."""

    def write(changes: dict[str, Any] | None = None, name: str = "recipe.yaml") -> Path:
        data = RECIPE
        for path, value in (changes or {}).items():
            data = change(data, path, value)
        file = project / name
        file.write_text(yaml.safe_dump(data, sort_keys=False))
        return file

    return write
