"""Packing and unpacking by kernel equals the specification."""

from __future__ import annotations

import pytest
import torch
from quark_native.formats import Format
from quark_native.kernels import dispatch, library
from quark_native.kernels.dispatch import forced

NAMES = (
    "mxfp8",
    "mxfp8_e5m2",
    "mxfp6",
    "mxfp6_e3m2",
    "mxfp4",
    "mxfp4{64}",
    "mxint8",
    "mxint6",
    "mxint4",
    "mxint2",
    "block_minifloat[8|4|8]{32}",
    "block_minifloat[6|3|8]{32}",
    "mxfp8/scale:rceil",
    "mxfp4/nearest_away",
    "mxfp6/floor",
    "mxfp4/stochastic",
)


@pytest.mark.skipif(library.load()[0] is None, reason=library.load()[1])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0, 60, None])
def test_codes_and_values_are_the_specifications(name, dtype, spread):
    generator = torch.Generator().manual_seed(0)
    if spread is None:
        bits = torch.randint(-(1 << 31), (1 << 31) - 1, (64, 320), generator=generator)
        x = bits.to(torch.int32).view(torch.float32).to(dtype)
    else:
        exponents = torch.randint(-spread, spread + 1, (64, 320), generator=generator)
        x = (torch.randn(64, 320, generator=generator) * torch.exp2(exponents.float())).to(dtype)
    fmt = Format.parse(name)
    assert dispatch.pack(fmt, x) is not None
    found = fmt.quantize(x)
    values = {kind: found.dequantize(kind) for kind in (torch.float32, dtype)}
    with forced("torch"):
        expected = fmt.quantize(x)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.parts["scale"], expected.parts["scale"])
        for kind, got in values.items():
            torch.testing.assert_close(
                got, expected.dequantize(kind), rtol=0, atol=0, equal_nan=True
            )


def test_four_bit_codes_stand_low_nibble_first():
    packed = Format.parse("mxfp4").quantize(torch.tensor([[1.0, 6.0] + [0.0] * 30]))
    assert packed.codes[0] == 0x72
    assert packed.parts["scale"].tolist() == [[127]]


def test_what_no_kernel_packs_is_packed_all_the_same():
    x = torch.randn(5, 33)
    packed = Format.parse("mxfp4").quantize(x)
    assert torch.equal(packed.dequantize(), Format.parse("mxfp4").fake_quantize(x))
