"""Minifloats against torch's dtypes, ml_dtypes, and a table of all their values."""

from __future__ import annotations

import pytest
import torch
from quark_native.formats import Format
from quark_native.formats.minifloat import element_of

from quark_core.errors import UnsupportedSpecError
from quark_core.formats import parse_format

TORCH = {
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
    "fp8_e5m2fnuz": torch.float8_e5m2fnuz,
}
ML_DTYPES = {
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "fp6_e3m2": "float6_e3m2fn",
    "fp6_e2m3": "float6_e2m3fn",
    "fp4_e2m1": "float4_e2m1fn",
    "fp[1|4|3](ieee)": "float8_e4m3",
    "fp[1|3|4](ieee)": "float8_e3m4",
    "bfloat16": "bfloat16",
}
MAXIMA = {
    "fp8_e4m3": 448,
    "fp8_e5m2": 57344,
    "fp8_e4m3fnuz": 240,
    "fp8_e5m2fnuz": 57344,
    "fp6_e3m2": 28,
    "fp6_e2m3": 7.5,
    "fp4_e2m1": 6,
    "fp[1|4|3]": 480,
    "fp[1|5|2]": 114688,
    "fp[0|4|4]": 496,
    "fp[1|4|3,10]": 60,
    "fp[1|3|0]": 16,
}


@pytest.mark.parametrize("name", TORCH)
def test_all_codes_mean_what_torch_says(name, same):
    codes = torch.arange(256, dtype=torch.int32)
    theirs = codes.to(torch.uint8).view(TORCH[name]).float()
    ours = element_of(parse_format(name)).decode(codes)
    assert same(ours, theirs)
    assert torch.equal(ours.signbit()[~ours.isnan()], theirs.signbit()[~ours.isnan()])


@pytest.mark.parametrize("name", TORCH)
def test_rounding_is_torchs(name):
    element = element_of(parse_format(name))
    x = torch.randn(200_000) * torch.exp2(torch.randint(-20, 18, (200_000,)).float())
    x = x.clamp(-element.max, element.max)  # torch's casts do not saturate
    theirs = x.to(TORCH[name])
    assert torch.equal(element.nearest(x), theirs.float())
    assert torch.equal(element.encode(element.nearest(x)), theirs.view(torch.uint8).int())


@pytest.mark.parametrize("name", ML_DTYPES)
def test_codes_are_those_of_ml_dtypes(name, golden):
    vectors, element = golden("casts"), element_of(parse_format(name))
    x = vectors["input"]
    within = x.abs() <= element.max  # beyond, e4m3 and e5m2 do not saturate there
    assert within.sum() > 12_000
    codes = element.encode(element.nearest(x))
    assert torch.equal(codes[within], vectors[ML_DTYPES[name]][within].int())


@pytest.mark.parametrize(("name", "largest"), MAXIMA.items())
def test_the_nearest_of_all_values_is_taken(name, largest):
    element, number = element_of(parse_format(name)), parse_format(name)
    assert element.max == largest
    values = element.decode(torch.arange(2**number.bits, dtype=torch.int32))
    values = values[values.isfinite()].unique()
    assert values.max() == largest
    assert torch.equal(element.nearest(values), values)
    assert torch.equal(element.decode(element.encode(values)), values)
    x = torch.randn(2000) * largest * torch.rand(2000) ** 4 * 1.5
    distances = (x.double()[:, None] - values.double()).abs()
    error = (element.nearest(x).double() - x.double()).abs()
    assert torch.equal(error, distances.min(1).values)


@pytest.mark.parametrize("name", MAXIMA)
def test_out_of_range_saturates_and_nan_stays(name):
    element = element_of(parse_format(name))
    x = torch.tensor([1e30, torch.inf, -1e30, -torch.inf, torch.nan])
    found = element.nearest(x)
    lowest = -element.max if element.signed else 0.0
    assert found[:4].tolist() == [element.max, element.max, lowest, lowest]
    assert found[4].isnan()


@pytest.mark.parametrize("name", TORCH)
def test_nan_has_a_code_where_the_format_has_one(name):
    element = element_of(parse_format(name))
    code = element.encode(torch.tensor([torch.nan]))
    assert element.decode(code).isnan().all()


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp4_e2m1", "fp[1|3|2]"])
def test_the_scale_puts_the_largest_value_on_the_largest_element(name):
    fmt = Format.parse(f"{name}/tensor")
    x = torch.randn(64, 64)
    scale = (x.abs().max().double() / element_of(parse_format(name)).max).float()
    assert torch.equal(fmt.measure(x).scale, scale)
    expected = element_of(parse_format(name)).nearest(x / scale) * scale
    assert torch.equal(fmt.fake_quantize(x), expected)
    assert fmt.fake_quantize(x).abs().max() == x.abs().max()


def test_a_power_of_two_scale_does_not_clip():
    fmt = Format.parse("fp8_e4m3/channel/power_of_two")
    x = torch.tensor([[448.0], [449.0], [-896.0], [900.0]])
    assert fmt.measure(x).scale.tolist() == [1.0, 2.0, 2.0, 4.0]


def test_unsigned_floats_are_scaled_by_their_positive_side():
    fmt = Format.parse("fp[0|4|4]/tensor")
    x = torch.tensor([-1000.0, 496.0])
    assert fmt.measure(x).scale.item() == 1.0
    assert fmt.fake_quantize(x).tolist() == [0.0, 496.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fp[1|8|7]", r"fp\[1\|8\|7\] reaches from 2\^-133 to 2\^128, outside float32's"),
        ("fp[1|0|7]", r"fp\[1\|0\|7\] has no exponent bits: use an integer format instead"),
        ("float32", "float32 is what tensors are in: leave the tensor out"),
        ("int8/e8m0", "int8 has float32, power_of_two, unit scales here, not e8m0"),
        ("log[10]", r"log\[10\] has more exponents than float32: use at most 9 bits"),
        ("log[9]", r"log\[9\] reaches from 2\^-127 to 2\^128, outside float32's"),
        ("log[8]/floor", r"log\[8\] is not rounded to multiples: leave rounding out"),
        ("bfp[8|8]{16}(SD)/floor", "say how it is rounded: leave rounding out"),
        ("block_minifloat[8|6|8]{16}", "has more exponents than fit beside a scale"),
    ],
)
def test_what_cannot_be_done_is_refused(text, message):
    with pytest.raises(UnsupportedSpecError, match=message):
        Format.parse(text)
