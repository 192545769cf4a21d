"""Block floating point against dmx-compressor where that follows its own definition."""

from __future__ import annotations

import pytest
import torch
from quark_native.formats import Format
from torch import Tensor

SHORTHANDS = ("BFP[2|8]{32}(SN)", "BFP[4|8]{16}(SN)", "BFP[8|8]{64}(SN)", "BFP[16|8]{64}(SN)")
DEFECTIVE = 2.0**126  # from here on dmx-compressor returns -max everywhere
SUBNORMAL = 2.0**-126  # below, its mantissas need a bit more than there is


def by_definition(x: Tensor, bits: int, block: int) -> Tensor:
    """The module's formula, one block of the last axis after another, in float64."""
    result = torch.empty_like(x, dtype=torch.float64)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], block):
            part = x[row, start : start + block].double()
            largest = part.abs().max()
            if not largest.isfinite():
                result[row, start : start + block] = torch.nan
                continue
            exponent = torch.frexp(largest).exponent.item() - 1 if largest else -127
            exponent = max(exponent, -127)
            step, fine = 2.0 ** (exponent + 2 - bits), 2.0 ** (exponent - 21)
            codes = torch.round(torch.round(part / fine) * fine / step)
            highest = 2 ** (bits - 1) - 1
            result[row, start : start + block] = codes.clamp(-highest, highest) * step
    return result


@pytest.mark.parametrize("shorthand", SHORTHANDS)
def test_values_equal_dmx_bit_for_bit(shorthand, golden, same):
    vectors = golden("formats")
    keys = [key for key in vectors if key.startswith(f"dmx|{shorthand}|")]
    assert len(keys) >= 12
    compared = 0
    for key in keys:
        _, axis, name = key.rsplit("|", 2)
        x, fmt = vectors[f"input|{name}"], Format.parse(shorthand, axis=int(axis))
        found, expected = fmt.fake_quantize(x), vectors[key]
        largest = fmt.layout.largest(x)
        defined = ((largest >= SUBNORMAL) & (largest < DEFECTIVE)) | (largest == 0)
        defined |= ~largest.isfinite()
        mask = fmt.layout.spread(defined, x.ndim).expand_as(fmt.layout.split(x))
        mask = fmt.layout.join(mask, tuple(x.shape))
        assert same(found[mask], expected[mask]), key
        assert same(fmt.decode(fmt.encode(x)), found), key
        compared += int(mask.sum())
    assert compared > 15_000


@pytest.mark.parametrize(("bits", "block"), [(2, 32), (4, 16), (8, 64), (16, 64)])
@pytest.mark.parametrize("name", ["huge", "subnormal", "tiny", "ties", "naninf", "tail_100"])
def test_values_follow_the_definition_where_dmx_does_not(bits, block, name, golden, same):
    x = golden("formats")[f"input|{name}"]
    fmt = Format.parse(f"bfp[{bits}|8]{{{block}}}")
    assert same(fmt.fake_quantize(x).double(), by_definition(x, bits, block))


def test_dmx_is_wrong_at_two_to_the_126_and_we_are_not(golden):
    vectors = golden("formats")
    x, theirs = vectors["input|huge"], vectors["dmx|BFP[8|8]{64}(SN)|-1|huge"]
    rows = x.abs().amax(1) >= DEFECTIVE
    assert rows.any()
    assert (theirs[rows] < 0).all()
    ours = Format.parse("bfp[8|8]{64}").fake_quantize(x)[rows]
    assert (ours.sign() * x[rows].sign() >= 0).all()
    assert ((ours - x[rows]).abs() <= x[rows].abs().amax(1, keepdim=True) / 64).all()


def test_two_roundings_as_in_the_definition():
    fmt = Format.parse("bfp[8|8]{2}")
    x = torch.tensor([[1.0, 2.0**-7 + 2.0**-22], [1.0, 2.0**-7 + 2.0**-21]])
    assert fmt.fake_quantize(x).tolist() == [[1.0, 0.0], [1.0, 2.0**-6]]


def test_blocks_of_one_are_floats(golden, same):
    vectors, fmt = golden("formats"), Format.parse("bfp[24|8]{1}")
    for name in ("normal", "pow2_edge"):
        expected = vectors[f"dmx|BFP[24|8]{{1}}(SN)|-1|{name}"]
        assert same(fmt.fake_quantize(vectors[f"input|{name}"]), expected)


def test_blocks_of_one_saturate_at_the_end_of_float32():
    x = torch.tensor([torch.finfo(torch.float32).max])
    fmt = Format.parse("bfp[8|8]{1}")
    assert fmt.fake_quantize(x).item() == 127 * 2.0**121
    assert fmt.decode(fmt.encode(x)).item() == 127 * 2.0**121


@pytest.mark.parametrize("name", ["normal", "huge", "subnormal", "tiny", "zeros", "naninf"])
@pytest.mark.parametrize("bits", [2, 8, 24])
def test_stored_exponents_restore_the_steps(name, bits, golden, same):
    fmt = Format.parse(f"bfp[{bits}|8]{{16}}")
    scale = fmt.measure(golden("formats")[f"input|{name}"]).scale
    stored = fmt.store_scale(scale)
    assert stored.dtype == torch.uint8
    assert same(fmt.restore_scale(stored), scale)
