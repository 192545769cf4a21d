"""MX formats against the values that microxcaling and torchao agree on."""

from __future__ import annotations

import pytest
import torch
from quark_native.formats import Format

FLOATS = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4_e2m1")
INTEGERS = ("mxint8", "mxint4", "mxint2")
INPUTS = 13  # of microxcaling; torchao has one fewer, since it wants whole blocks


@pytest.mark.parametrize("name", FLOATS + INTEGERS)
def test_values_equal_the_oracle_bit_for_bit(name, golden, same):
    fmt, vectors = Format.parse(name), golden("formats")
    keys = [key for key in vectors if key.startswith(f"mx|{name}|")]
    assert len(keys) == INPUTS
    for key in keys:
        x = vectors[f"input|{key.split('|')[2]}"]
        assert same(fmt.fake_quantize(x), vectors[key]), key
        assert same(fmt.decode(fmt.encode(x)), vectors[key]), key


@pytest.mark.parametrize("name", FLOATS)
def test_codes_and_scales_equal_torchao(name, golden):
    fmt, vectors = Format.parse(name), golden("formats")
    keys = [key for key in vectors if key.startswith(f"torchao|{name}|") and key.endswith("|q")]
    assert len(keys) == INPUTS - 1
    for key in keys:
        x = vectors[f"input|{key.split('|')[2]}"]
        encoded = fmt.encode(x)
        scales = fmt.store_scale(encoded.parameters.scale)
        assert torch.equal(scales, vectors[key.removesuffix("q") + "scale"]), key
        assert torch.equal(fmt.restore_scale(scales).isnan(), scales == 255)
        codes = encoded.codes
        if name == "mxfp4_e2m1":
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        sound = ~encoded.parameters.scale.isnan().repeat_interleave(codes.shape[1] // 2, 1)
        assert torch.equal(codes[sound], vectors[key][sound].to(torch.int32)), key


def test_block_size_comes_from_the_format():
    x = torch.tensor([[1.0] * 16 + [100.0] * 16])
    assert Format.parse("mxint4{16}").measure(x).scale.tolist() == [[1.0, 64.0]]
    assert Format.parse("mxint4").measure(x).scale.tolist() == [[64.0]]
    assert Format.parse("mxfp4/group:8").measure(x).scale.shape == (1, 4)


def test_one_bad_value_makes_its_block_nan_and_no_other():
    x = torch.ones(2, 64)
    x[0, 3], x[1, 40] = torch.inf, torch.nan
    expected = torch.zeros(2, 64, dtype=torch.bool)
    expected[0, :32], expected[1, 32:] = True, True
    for name in ("mxfp4", "mxfp8", "mxint8"):
        assert torch.equal(Format.parse(name).fake_quantize(x).isnan(), expected)


def test_limits_are_the_largest_elements():
    low, high = Format.parse("mxfp4").limits(Format.parse("mxfp4").measure(torch.full((32,), 4.0)))
    assert (low.item(), high.item()) == (-6.0, 6.0)


def test_a_range_from_elsewhere_is_refused():
    with pytest.raises(TypeError, match="mxfp4_e2m1 takes its scales from the tensor itself"):
        Format.parse("mxfp4").cover(torch.tensor(-1.0), torch.tensor(1.0))
