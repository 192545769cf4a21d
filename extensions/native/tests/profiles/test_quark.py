"""AMD Quark's block formats, on every output it was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quark_native.profiles.quark import bfp16, microexponents, mx

DIGESTS = Path(__file__).resolve().parents[1] / "golden" / "profiles_formats.json"


@pytest.mark.parametrize("key", json.loads(DIGESTS.read_text())["quark"])
def test_outputs_equal_the_library_bit_for_bit(key, inputs, check):
    element, scaling, axis, name = key.split("|")
    if element == "bfp16":
        found = bfp16(inputs[name], axis=int(axis))
    elif element in {"mx6", "mx9"}:
        found = microexponents(inputs[name], element, axis=int(axis))
    else:
        found = mx(inputs[name], element, axis=int(axis), scaling=scaling)
    check("quark", key, found)


@pytest.mark.parametrize("function", [mx, bfp16, microexponents])
def test_other_axes_hold_blocks_too(function, inputs):
    x = inputs["axis_3d"].clone()
    found = function(x, axis=1)
    assert torch.equal(found, function(x.movedim(1, -1)).movedim(-1, 1))
    assert torch.equal(x, inputs["axis_3d"])


def test_bfp16_keeps_minus_128_and_doubles_for_plus_128():
    x = torch.tensor([[-1.9944], [1.9944]]) * torch.ones(2, 8)
    x[:, 1] = 1 / 64
    assert bfp16(x)[0, :2].tolist() == [-2.0, 1 / 64]
    assert bfp16(x)[1, :2].tolist() == [2.0, 0.0]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="element 'int4' is none of fp8_e4m3"):
        mx(torch.ones(32), "int4")
    with pytest.raises(ValueError, match="scaling 'rceil' is none of even, floor, ceil"):
        mx(torch.ones(32), scaling="rceil")
    with pytest.raises(ValueError, match="name 'mx4' is none of mx6, mx9"):
        microexponents(torch.ones(16), "mx4")
