"""gfloat's block quantization, on every output it was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quark_native.profiles.gfloat import mx

DIGESTS = Path(__file__).resolve().parents[1] / "golden" / "profiles_formats.json"
ROWS = 8


@pytest.mark.parametrize("key", json.loads(DIGESTS.read_text())["gfloat"])
def test_outputs_equal_the_library_bit_for_bit(key, inputs, check):
    element, name = key.split("|")
    check("gfloat", key, mx(inputs[name][:ROWS], element))


def test_int8_has_minus_128():
    x = torch.tensor([-1.9921875, 1.9921875]).repeat(16)
    assert mx(x, "int8")[:2].tolist() == [-2.0, 127 / 64]


def test_nan_needs_a_code():
    x = torch.ones(64)
    x[40] = torch.nan
    assert mx(x)[:32].equal(x[:32])
    assert mx(x)[32:].isnan().all()
    for element in ("fp6_e3m2", "fp6_e2m3", "fp4_e2m1", "int8"):
        with pytest.raises(ValueError, match=f"{element} has no NaN"):
            mx(x, element)


def test_other_axes_hold_blocks_too(inputs):
    x = inputs["axis_3d"].clone()
    assert torch.equal(mx(x, axis=1), mx(x.movedim(1, -1)).movedim(-1, 1))
    assert torch.equal(x, inputs["axis_3d"])


def test_unknown_elements_are_refused():
    with pytest.raises(ValueError, match="element 'int4' is none of fp8_e4m3"):
        mx(torch.ones(32), "int4")
