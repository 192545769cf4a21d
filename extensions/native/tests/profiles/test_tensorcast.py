"""tensorcast, on every output it was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quark_native.profiles.tensorcast import bfp16, mx

DIGESTS = Path(__file__).resolve().parents[1] / "golden" / "profiles_formats.json"


@pytest.mark.parametrize("key", json.loads(DIGESTS.read_text())["tensorcast"])
def test_outputs_equal_the_library_bit_for_bit(key, inputs, check):
    element, rounding, scalemode, name = key.split("|")
    if element == "bfp16":
        assert scalemode == "max"
        found = bfp16(inputs[name], rounding=rounding)
    else:
        found = mx(inputs[name], element, rounding=rounding, scalemode=scalemode)
    check("tensorcast", key, found)


def test_blocks_of_other_axes_come_back_in_the_wrong_places(inputs):
    x = inputs["normal"]
    right = mx(x.T.contiguous(), "int4")
    found = mx(x, "int4", axis=0)
    assert found.shape == (64, 32)
    assert torch.equal(found.T.flatten(), right.flatten())
    assert not torch.equal(found, right)


def test_input_stays_as_it_is(inputs):
    x = inputs["zeros"].clone()
    assert mx(x, scalemode="midmax").shape == x.shape
    assert torch.equal(x, inputs["zeros"])


def test_ties_by_rounding():
    x = torch.tensor([1.0, 0.125, -0.375, 0.375]).repeat(8)
    for rounding, expected in (
        ("even", [1.0, 0.0, -0.5, 0.5]),
        ("away", [1.0, 0.25, -0.5, 0.5]),
        ("zero", [1.0, 0.0, -0.25, 0.25]),
    ):
        assert mx(x, "int4", rounding=rounding)[:4].tolist() == expected


def test_what_cannot_be_cast_is_refused():
    with pytest.raises(ValueError, match="an axis of 33 is no multiple of the block 32"):
        mx(torch.ones(33))
    with pytest.raises(ValueError, match="rounding 'up' is none of"):
        mx(torch.ones(32), rounding="up")
    with pytest.raises(ValueError, match="scalemode 'auto' is none of"):
        mx(torch.ones(32), scalemode="auto")
