"""Bit packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quark_native.packing import pack, packed_bytes, unpack


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(1, 17))
@given(count=st.integers(0, 40), seed=st.integers(0, 1000))
def test_codes_come_back(bits, signed, count, seed):
    low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, high, (count,), generator=generator).int()
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(count, bits)
    assert torch.equal(unpack(packed, bits, count, signed=signed), codes)


def test_no_bit_is_wasted():
    assert packed_bytes(1000, 3) == 375
    assert packed_bytes(1001, 3) == 376
    assert packed_bytes(10, 12) == 15


def test_the_first_code_takes_the_lowest_bits():
    assert pack(torch.tensor([0x1, 0xA, 0x3]), 4).tolist() == [0xA1, 0x03]
    assert pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 1]), 1).tolist() == [0x81, 0x01]
    assert pack(torch.tensor([-1, -2]), 4).tolist() == [0xEF]


def test_wide_codes_are_low_bytes_then_the_rest():
    assert pack(torch.tensor([0x123, 0x456]), 12).tolist() == [0x23, 0x56, 0x41]


def test_more_codes_than_one_step_takes():
    codes = torch.randint(0, 8, ((1 << 20) + 5,)).int()
    assert torch.equal(unpack(pack(codes, 3), 3, codes.numel(), signed=False), codes)


def test_shapes_and_strides_do_not_matter():
    codes = torch.randint(0, 16, (6, 7)).int()
    assert torch.equal(pack(codes.t(), 4), pack(codes.t().contiguous(), 4))
