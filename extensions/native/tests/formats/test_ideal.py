"""Minifloats, alone and in blocks, against computations in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from quark_native.formats import Format

with np.load(Path(__file__).parents[1] / "golden/ideal.npz") as file:
    KEYS = [key for key in file if not key.startswith("input|")]


@pytest.mark.parametrize("key", KEYS)
def test_equals_the_exact_computation(key, golden, same):
    name, source = key.rsplit("|", 1)
    x, expected = golden("ideal")[f"input|{source}"], golden("ideal")[key]
    fmt = Format.parse(name)
    found = fmt.fake_quantize(x)
    if fmt.layout.kind == "group":
        # The computation knows no limit of the shared exponent.
        _, exponent = torch.frexp(fmt.layout.largest(x))
        half = 2 ** (int(fmt.number.shared_bits) - 1)
        limited = (exponent - 1 < 1 - half) | (exponent - 1 > half)
        limited |= fmt.measure(x).scale < 2.0**-126
        limited = fmt.layout.spread(limited, x.ndim).expand_as(fmt.layout.split(x))
        limited = fmt.layout.join(limited, tuple(x.shape))
        found = torch.where(limited, expected, found)
    assert same(found, expected)
