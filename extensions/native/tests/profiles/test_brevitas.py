"""Brevitas' MX quantizers, on every output they were asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quark_native.profiles.brevitas import mx

DIGESTS = Path(__file__).resolve().parents[1] / "golden" / "profiles_formats.json"


@pytest.mark.parametrize("key", json.loads(DIGESTS.read_text())["brevitas"])
def test_outputs_equal_the_library_bit_for_bit(key, inputs, check):
    element, name = key.split("|")
    check("brevitas", key, mx(inputs[name], element))


def test_int8_clips_from_the_power_of_two_up():
    x = torch.tensor([1.0, -1.0, 1.9, 0.5]).repeat(8)
    assert mx(x, "int8")[:4].tolist() == [127 / 128, -1.0, 127 / 128, 0.5]


def test_small_blocks_collapse():
    x = torch.full((32,), 2.0**-50)
    assert not mx(x, "fp4_e2m1").any()
    assert mx(x * 2**30, "fp4_e2m1").equal(x * 2**30)


def test_other_axes_hold_blocks_too(inputs):
    x = inputs["axis_3d"].clone()
    assert torch.equal(mx(x, axis=1), mx(x.movedim(1, -1)).movedim(-1, 1))
    assert torch.equal(x, inputs["axis_3d"])


def test_unknown_elements_are_refused():
    with pytest.raises(ValueError, match="element 'int4' is none of fp8_e4m3"):
        mx(torch.ones(32), "int4")
