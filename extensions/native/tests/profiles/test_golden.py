"""The comparison itself: nothing is missing, and a wrong output fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quark_native.profiles import gfloat

DIGESTS = Path(__file__).resolve().parents[1] / "golden" / "profiles_formats.json"
OUTPUTS = {
    "microxcaling_torch": 480,
    "microxcaling_cpp": 336,
    "torchao_mx": 960,
    "torchao_mx_main": 720,
    "torchao_nvfp4": 60,
    "dmx_compressor": 880,
    "dmx_mltools": 432,
    "quark": 258,
    "brevitas": 72,
    "tensorcast": 516,
    "gfloat": 68,
}


def test_all_outputs_have_a_digest():
    found = json.loads(DIGESTS.read_text())
    assert {file: len(keys) for file, keys in found.items()} == OUTPUTS


def test_one_wrong_value_fails(inputs, check):
    right = gfloat.mx(inputs["normal"][:8], "int8")
    check("gfloat", "int8|normal", right)
    wrong = right.clone()
    wrong[3, 5] += 2.0**-30 if wrong[3, 5] == 0 else wrong[3, 5] * 2.0**-20
    with pytest.raises(pytest.fail.Exception, match=r"gfloat int8\|normal"):
        check("gfloat", "int8|normal", wrong)


def test_signs_of_zero_and_kinds_of_nan_are_one(inputs, check):
    zeros = gfloat.mx(inputs["zeros"][:8], "fp8_e4m3")
    check("gfloat", "fp8_e4m3|zeros", torch.where(zeros == 0, -0.0, zeros))
    nan = gfloat.mx(inputs["naninf"][:8])
    check("gfloat", "fp8_e4m3|naninf", torch.where(nan.isnan(), -torch.tensor(torch.nan), nan))
