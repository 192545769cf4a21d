"""Integers against AIMET, and against every code there is."""

from __future__ import annotations

import pytest
import torch
from quark_native.formats import Format, Parameters

LAYOUTS = {
    # AIMET's layout: (granularity, axis)
    "tensor": ("tensor", None),
    "channel0": ("channel", 0),
    "channel1": ("channel", 1),
    "conv_channel": ("channel", 0),
    "block": ("group:16", -1),
}
CASES = (
    "tensor-w2-asym",
    "tensor-w4-sym",
    "tensor-w8-sym",
    "tensor-w16-asym",
    "channel0-w8-asym",
    "channel1-w4-sym",
    "channel1-w16-sym",
    "conv_channel-w8-sym",
    "block-w4-sym",
    "block-w8-asym",
)


def aimet_format(case: str) -> Format:
    layout, width, symmetry = case.split("-")
    granularity, axis = LAYOUTS[layout]
    sign = "" if symmetry == "sym" else "u"
    return Format.parse(f"{sign}int{width[1:]}/{granularity}/{symmetry}", axis=axis)


@pytest.mark.parametrize("case", CASES)
def test_ranges_become_aimets_scales(case, golden):
    vectors, fmt = golden("affine"), aimet_format(case)
    found = fmt.measure(vectors[f"{case}/x"])
    expected = vectors[f"{case}/scale"].reshape(found.scale.shape)
    torch.testing.assert_close(found.scale, expected, rtol=1e-6, atol=0)
    if found.zero_point is not None:
        # AIMET's offset is the negative zero point.
        offset = vectors[f"{case}/offset"].reshape(found.scale.shape)
        assert torch.equal(found.zero_point, -offset.to(torch.int32))


@pytest.mark.parametrize("case", CASES)
def test_given_the_scale_codes_and_values_are_aimets(case, golden):
    vectors, fmt = golden("affine"), aimet_format(case)
    x = vectors[f"{case}/x"]
    shape = fmt.measure(x).scale.shape
    zero_point = None
    if not fmt.symmetric:
        zero_point = -vectors[f"{case}/offset"].to(torch.int32).reshape(shape)
    parameters = Parameters(vectors[f"{case}/scale"].reshape(shape), zero_point)
    assert torch.equal(fmt.fake_quantize(x, parameters), vectors[f"{case}/qdq"])
    codes = fmt.encode(x, parameters).codes
    assert torch.equal(codes, vectors[f"{case}/q"].to(torch.int32))


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("sign", ["", "u"])
def test_every_code_is_used_and_no_other(bits, sign):
    fmt = Format.parse(f"{sign}int{bits}/tensor/asym")
    lowest = 0 if sign else -(2 ** (bits - 1))
    x = torch.linspace(-3.0, 5.0, 400_000)
    codes = fmt.encode(x).codes
    assert codes.unique().tolist() == list(range(lowest, lowest + 2**bits))


def test_symmetric_uses_the_full_range():
    fmt = Format.parse("int8/tensor")
    assert fmt.measure(torch.tensor([-128.0, 5.0])).scale.item() == 1.0
    assert fmt.measure(torch.tensor([-5.0, 127.0])).scale.item() == 1.0
    assert fmt.encode(torch.tensor([-128.0, 5.0])).codes.tolist() == [-128, 5]
    assert [limit.item() for limit in fmt.limits(Parameters(torch.tensor(2.0)))] == [-256, 254]


def test_ties_go_to_even():
    fmt, one = Format.parse("int8/tensor"), Parameters(torch.tensor(1.0))
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5])
    assert fmt.fake_quantize(x, one).tolist() == [0, 2, 2, 0, -2, 126]


def test_zero_is_exact_and_always_within_the_range():
    fmt = Format.parse("uint4/tensor/asym")
    for x in (torch.tensor([3.0, 7.0]), torch.tensor([-7.0, -3.0]), torch.tensor([-1.0, 2.7])):
        assert fmt.fake_quantize(torch.zeros(1), fmt.measure(x)).item() == 0.0
    assert fmt.measure(torch.tensor([3.0, 7.5])).scale.item() == 0.5


def test_unsigned_symmetric_has_no_negative_values():
    fmt = Format.parse("uint8/tensor/sym")
    assert fmt.fake_quantize(torch.tensor([-3.0, 255.0])).tolist() == [0.0, 255.0]


@pytest.mark.parametrize("name", ["int8/tensor", "int8/tensor/asym", "uint4/tensor/asym"])
def test_a_power_of_two_scale_is_the_smallest_that_does_not_clip(name):
    exact, rounded = Format.parse(name), Format.parse(f"{name}/power_of_two")
    for largest in (1.0, 0.999, 127.0, 127.00001, 3e-38, 1e38):
        x = torch.tensor([-largest / 3, largest])
        needed, scale = exact.measure(x).scale.item(), rounded.measure(x).scale.item()
        assert torch.frexp(torch.tensor(scale)).mantissa.item() == 0.5
        assert needed <= scale
        assert scale < 2 * needed or scale == 2.0**-126
        assert rounded.restore_scale(rounded.store_scale(torch.tensor(scale))).item() == scale


def test_a_power_of_two_is_kept_and_one_ulp_more_is_doubled():
    fmt = Format.parse("int8/tensor/power_of_two")
    above = torch.nextafter(torch.tensor(127.0), torch.tensor(200.0)).item()
    assert fmt.measure(torch.tensor([127.0])).scale.item() == 1.0
    assert fmt.measure(torch.tensor([above])).scale.item() == 2.0


def test_scales_of_zeros_and_subnormals_are_normal():
    fmt = Format.parse("int8/channel")
    x = torch.tensor([[0.0, 0.0], [1e-44, 0.0]])
    assert fmt.measure(x).scale.tolist() == [2.0**-126, 2.0**-126]
    assert fmt.fake_quantize(x).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_the_widest_ranges_do_not_overflow():
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([-largest, largest])
    for name in ("uint8/tensor/asym", "int4/tensor", "uint1/tensor/asym"):
        assert Format.parse(name).measure(x).scale.isfinite()


def test_not_finite_values_make_the_scale_nan():
    fmt = Format.parse("int8/channel")
    x = torch.tensor([[1.0, torch.inf], [1.0, torch.nan], [1.0, 2.0]])
    assert fmt.measure(x).scale.isnan().tolist() == [True, True, False]
    assert fmt.fake_quantize(x).isnan().all(1).tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype):
    fmt = Format.parse("int16/group:32")
    x = torch.randn(4, 100).to(dtype)
    found = fmt.fake_quantize(x)
    assert found.dtype == dtype
    assert torch.equal(found, fmt.fake_quantize(x.float()).to(dtype))
