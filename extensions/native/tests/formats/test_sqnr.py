"""Fidelity of one cast of N(0, 1) beside what is known of other libraries."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[4] / "benchmarks/sqnr.py"))


@pytest.fixture(scope="module")
def x():
    return SCRIPT["sample"]()[:256]


@pytest.mark.parametrize(("name", "profile", "known"), SCRIPT["ROWS"])
def test_fidelity_is_the_known_one(name, profile, known, x):
    # A million numbers repeat to about 0.05 dB.
    assert SCRIPT["sqnr"](x, name, profile) == pytest.approx(known, abs=0.1)
