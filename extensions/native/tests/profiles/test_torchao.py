"""torchao's MX and NVFP4, on every output it was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quark_native.profiles.torchao import mx, mx_main, nvfp4, per_tensor_scale

DIGESTS = json.loads(
    (Path(__file__).resolve().parents[1] / "golden" / "profiles_formats.json").read_text()
)
MX = {"torchao_mx": mx, "torchao_mx_main": mx_main}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
MX_CASES = [
    (file, key.removesuffix("|q")) for file in MX for key in DIGESTS[file] if key.endswith("|q")
]
ALL_ONES = -1
NVFP4_KEYS = list(DIGESTS["torchao_nvfp4"])


def test_every_output_is_covered():
    assert 3 * len(MX_CASES) == sum(len(DIGESTS[file]) for file in MX)


@pytest.mark.parametrize(("file", "key"), MX_CASES)
def test_mx_outputs_equal_the_library_bit_for_bit(file, key, inputs, check):
    element, scaling, dtype, name = key.split("|")
    x = inputs[name].to(DTYPES[dtype])
    if dtype == "bf16":
        # The payload shows in fp4 and fp6; torch's vectorized cast on x86-64 sets all bits.
        x.view(torch.int16)[x.isnan()] = ALL_ONES
    found = MX[file](x, element, scaling=scaling)
    assert found.values.dtype == DTYPES[dtype]
    check(file, f"{key}|scale", found.scale)
    check(file, f"{key}|q", found.codes)
    check(file, f"{key}|dq", found.values.float())


@pytest.mark.parametrize("key", NVFP4_KEYS)
def test_nvfp4_outputs_equal_the_library_bit_for_bit(key, inputs, check):
    levels, name, part = key.split("|")
    outer = per_tensor_scale(inputs[name]).reshape(1) if levels == "two" else None
    found = nvfp4(inputs[name], outer)
    parts = {"q": found.codes, "scale": found.scale, "pts": outer}
    check("torchao_nvfp4", key, parts[part])


def test_nvfp4_values_are_codes_times_both_scales():
    x = torch.full((1, 16), 0.5)
    x[0, 1], x[0, 2] = -3.0, 0.3
    found = nvfp4(x)
    assert found.scale.tolist() == [[0x30]]  # 3 / 6 = 2**-1
    assert found.codes[0, :2].tolist() == [0xF2, 0x21]
    assert found.values[0, :4].tolist() == [0.5, -3.0, 0.25, 0.5]
    doubled = nvfp4(x, torch.tensor([0.5]))
    assert doubled.scale.tolist() == [[0x38]]
    assert torch.equal(doubled.values, found.values)
    assert doubled.values.dtype == torch.float32
    assert nvfp4(x.bfloat16()).values.dtype == torch.bfloat16


@pytest.mark.parametrize("function", MX.values())
def test_input_stays_as_it_is(function, inputs):
    x = inputs["naninf"].clone()
    function(x, scaling="even")
    torch.testing.assert_close(x, inputs["naninf"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", MX.values())
def test_what_the_library_refuses_is_refused(function):
    with pytest.raises(ValueError, match="33 is no multiple of the block 32"):
        function(torch.ones(33))
    with pytest.raises(ValueError, match="element 'int8' is none of fp8_e4m3"):
        function(torch.ones(32), "int8")
    with pytest.raises(ValueError, match="scaling 'up' is none of"):
        function(torch.ones(32), scaling="up")


def test_blocks_at_the_smallest_scale_come_out_halved_in_0_18():
    x = torch.full((32,), 2.0**-120)
    assert mx(x, "fp8_e4m3").values[0] == 2.0**-121
    assert mx_main(x, "fp8_e4m3").values[0] == 2.0**-120
