"""Both paths of microxcaling, on every output it was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quark_native.profiles.microxcaling import mx_cpp, mx_torch

DIGESTS = Path(__file__).resolve().parents[1] / "golden" / "profiles_formats.json"
PATHS = {"microxcaling_torch": mx_torch, "microxcaling_cpp": mx_cpp}
KEYS = [(file, key) for file in PATHS for key in json.loads(DIGESTS.read_text())[file]]


@pytest.mark.parametrize(("file", "key"), KEYS)
def test_outputs_equal_the_library_bit_for_bit(file, key, inputs, check):
    element, rounding, block, axis, name = key.split("|")
    rounding, _, flush = rounding.partition("_")
    found = PATHS[file](
        inputs[name],
        element,
        block=int(block),
        axis=int(axis),
        rounding=rounding,
        flush_fp32_subnorms=flush == "flush",
    )
    check(file, key, found)


@pytest.mark.parametrize("function", PATHS.values())
def test_input_stays_as_it_is_and_shape_is_kept(function, inputs):
    x = inputs["axis_3d"].clone()
    assert function(x, "int8", axis=1, flush_fp32_subnorms=True).shape == x.shape
    assert torch.equal(x, inputs["axis_3d"])


@pytest.mark.parametrize("function", PATHS.values())
def test_block_zero_is_the_whole_axis(function, inputs):
    x = inputs["tail_100"]
    assert torch.equal(function(x, block=0), function(x, block=100))
    assert not torch.equal(function(x, "int4", block=0), function(x, "int4", block=32))


@pytest.mark.parametrize("function", PATHS.values())
def test_unknown_names_are_refused(function):
    with pytest.raises(ValueError, match="element 'fp5' is none of fp8_e4m3"):
        function(torch.ones(32), "fp5")
    with pytest.raises(ValueError, match="rounding 'up' is none of"):
        function(torch.ones(32), rounding="up")


def test_a_maximum_just_below_a_power_of_two_doubles_the_scale_of_one_path():
    x = torch.tensor([2.0**-28 * (1 - 2.0**-24), 2.0**-28 * 0.78])
    assert mx_torch(x, "fp4_e2m1", rounding="even").tolist() == [2.0**-28, 2.0**-28 * 0.75]
    assert mx_cpp(x, "int4", rounding="even").tolist() == [2.0**-29 * 1.75, 2.0**-29 * 1.5]
    assert mx_torch(x, "int4", rounding="even").tolist() == [2.0**-28, 2.0**-28 * 0.75]
