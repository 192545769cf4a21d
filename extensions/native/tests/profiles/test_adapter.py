"""Profiles by name give what their functions give, and refuse what their libraries have not."""

from __future__ import annotations

import pytest
import torch
from quark_native.formats import Format
from quark_native.profiles import aimet, dmx, mase, microxcaling, quark, torchao
from quark_native.profiles.adapter import PROFILES

from quark_core.errors import UnknownNameError, UnsupportedSpecError

X = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 5
EDGE = X.clone()
EDGE[0] = torch.nextafter(torch.tensor(2.0**-28), torch.tensor(0.0))


@pytest.mark.parametrize(
    ("name", "profile", "expected"),
    [
        ("mxfp8/nearest_away", "microxcaling", lambda x: microxcaling.mx_torch(x, "fp8_e4m3")),
        ("mxfp4", "microxcaling", lambda x: microxcaling.mx_torch(x, "fp4_e2m1", rounding="even")),
        (
            "mxfp8/scale:rceil",
            "torchao",
            lambda x: torchao.mx(x, "fp8_e4m3", scaling="rceil").values,
        ),
        ("nvfp4_one_level", "torchao", lambda x: torchao.nvfp4(x).values),
        ("mxfp8", "dmx", lambda x: dmx.cast(x, "MXFP8[E4M3]{32}")),
        ("bfp[4|8]{16}(_N)", "dmx", lambda x: dmx.cast(x, "BFP[4|8]{16}(_N)")),
        (
            "sbfp[4|4|4,7]{16}",
            "dmx",
            lambda x: dmx.cast(x, "SBFP<XP[4,0](CSN)><FP[0|4|4,7](FN)>{16}"),
        ),
        ("XP[8,+4](CSN)", "dmx", lambda x: dmx.cast(x, "XP[8,+4](CSN)")),
        ("mxfp4/scale:even", "quark", lambda x: quark.mx(x, "fp4_e2m1")),
        ("bfp16", "quark", quark.bfp16),
        ("mx9", "quark", lambda x: quark.microexponents(x, "mx9")),
        ("fixed[8,4]", "mase", lambda x: mase.integer(x, width=8, frac_width=4)),
        ("fp[1|4|3]/unit", "mase", lambda x: mase.minifloat_ieee(x, width=8, exponent_width=4)),
        ("log[8]", "mase", lambda x: mase.log(x, width=8)),
        (
            "block_fp[6|8]{16}",
            "mase",
            lambda x: mase.block_fp(x, width=6, block_size=[1, 16], skip_first_dim=False),
        ),
        (
            "mxfp8",
            "mase",
            lambda x: mase.mxfp(x, block_size=32, element_exp_bits=4, element_frac_bits=3),
        ),
        ("int8/tensor", "aimet", lambda x: aimet.affine(x, symmetric=True, bitwidth=8)),
        (
            "fp8_e4m3/unit",
            "aimet",
            lambda x: aimet.float_quantize_dequantize(x, dtype=torch.float8_e4m3fn),
        ),
    ],
)
def test_a_profile_is_its_function(name, profile, expected):
    fmt = Format.parse(name, profile=profile)
    for x in (X, EDGE):
        assert torch.equal(fmt.fake_quantize(x), expected(x))
    assert fmt.fake_quantize(X.to(torch.bfloat16)).dtype == torch.bfloat16


def test_the_default_is_right_where_log2_is_wrong():
    # Just below 2^-28 the float32 logarithm rounds up, and the scale of the block doubles: the
    # largest element is 6, but the maximum becomes 2 of the doubled scale's units.
    ours = Format.parse("mxfp4").fake_quantize(EDGE)[0]
    theirs = Format.parse("mxfp4", profile="microxcaling").fake_quantize(EDGE)[0]
    assert (ours == 6 * 2.0**-31).all()
    assert (theirs == 2.0**-28).all()


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_refuses_what_its_library_has_not(profile):
    with pytest.raises(UnsupportedSpecError, match=f"profile {profile} .* has no binary"):
        Format.parse("binary", profile=profile)


def test_a_misspelled_profile_is_told():
    with pytest.raises(UnknownNameError, match="unknown profile 'torcho'.*Did you mean 'torchao'"):
        Format.parse("mxfp4", profile="torcho")


def test_a_profile_has_no_codes():
    with pytest.raises(TypeError, match="profile dmx reproduces values, which may have no codes"):
        Format.parse("mxfp8", profile="dmx").encode(X)
