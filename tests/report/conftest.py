"""Finished runs to report on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quark_core.analysis.compare import compare
from quark_core.recipe.load import load_recipe
from quark_core.recipe.run import run_recipe

Write = Callable[..., Path]


@pytest.fixture
def run_folder(recipe: Write, tmp_path: Path) -> Path:
    """One run that missed a gate."""
    loaded = load_recipe(recipe({"evaluate.require": {"sqnr": ">= 500"}}))
    return run_recipe(loaded, root=tmp_path).folder


@pytest.fixture
def comparison_folder(recipe: Write, tmp_path: Path) -> Path:
    """Three runs, of which one failed."""
    bad = recipe({"quantizer.rules": [{"name": "lats", "skip": True}], "name": "bad"}, "bad.yaml")
    loaded = [
        load_recipe(recipe()),
        load_recipe(recipe(), overrides=["quantizer.weight=mxfp4", "name=four"]),
        load_recipe(bad),
    ]
    return compare(loaded, tmp_path, "three")
