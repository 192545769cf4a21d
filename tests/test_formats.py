"""Number formats by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quark_core.errors import UnknownNameError
from quark_core.formats import EXAMPLES, parse_format, with_block

small = st.integers(1, 8)
blocks = st.integers(1, 512)
spellings = st.one_of(
    st.sampled_from(EXAMPLES),
    st.builds("{}int{}".format, st.sampled_from(["", "u"]), st.integers(1, 32)),
    st.builds("fixed[{},{}]".format, st.integers(1, 32), st.integers(-8, 32)),
    st.builds("fp[{}|{}|{}]".format, st.integers(0, 1), small, st.integers(0, 10)),
    st.builds("bfp[{}|8]{{{}}}".format, st.integers(2, 24), blocks),
    st.builds("mxfp4_e2m1{{{}}}".format, blocks),
    st.builds("log[{},{}]".format, st.integers(2, 16), st.integers(-9, 9)),
    st.builds("block_minifloat[8|4|8]{{{}}}".format, blocks),
)


@given(spellings)
def test_canonical_names_name_themselves(text: str) -> None:
    name = parse_format(text).name
    assert parse_format(name) == parse_format(text)
    assert parse_format(f" {name.upper()} ") == parse_format(text)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("MXFP4", "mxfp4_e2m1"),
        ("mxfp8", "mxfp8_e4m3"),
        ("MXFP8_E5M2K16", "mxfp8_e5m2{16}"),
        ("MXFP8[E4M3]{32}", "mxfp8_e4m3"),
        ("BFP[8|8]{64}(SN)", "bfp[8|8]{64}"),
        ("BFP[8|8]{64,-1}(SN)", "bfp[8|8]{64}"),
        ("BFP16_64", "bfp[8|8]{64}"),
        ("BFP14_64", "bfp[6|8]{64}"),
        ("BFP12A_16", "bfp[4|8]{16}(_N)"),
        ("torch.float8_e4m3fn", "fp8_e4m3"),
        ("float4_e2m1fn_x2", "fp4_e2m1"),
        ("bf16", "bfloat16"),
        ("half", "float16"),
    ],
)
def test_other_spellings(spelling: str, name: str) -> None:
    assert parse_format(spelling).name == name


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int4", 4),
        ("fixed[8,4]", 8),
        ("fp[1|3|2]", 6),
        ("mxfp8", 8 + 8 / 32),
        ("mxfp6", 6 + 8 / 32),
        ("mxfp4", 4 + 8 / 32),
        ("mxfp4{16}", 4 + 8 / 16),
        ("nvfp4", 4 + 8 / 16),
        ("bfp[8|8]{64}", 8 + 8 / 64),
        ("sbfp[4|4|4]{16}", 4 + 8 / 16),
        ("bfp16", 9),
        ("msfp12", 4 + 8 / 16),
        ("mx4", 4),
        ("mx6", 6),
        ("mx9", 9),
        ("block_log[8|8]{16}", 8.5),
        ("binary", 1),
        ("ternary", 2),
    ],
)
def test_bits_per_element_count_shared_scales(name: str, bits: float) -> None:
    assert parse_format(name).bits_per_element == bits


@pytest.mark.parametrize(
    ("name", "shape", "axis", "count"),
    [
        ("int4", (3, 5), -1, 8),
        ("mxfp4", (2, 64), -1, 2 * (32 + 2)),
        ("mxfp4", (2, 33), -1, 33 + 4),
        ("mxfp4", (33, 2), 0, 33 + 4),
        ("mxfp8", (), -1, 2),
        ("mxfp8", (0, 32), -1, 0),
    ],
)
def test_packed_bytes(name: str, shape: tuple[int, ...], axis: int, count: int) -> None:
    assert parse_format(name).packed_bytes(shape, axis) == count


@pytest.mark.parametrize(
    "text", ["int0", "int33", "mxpf4", "fp[2|3|2]", "bfp[8|8]{0}", "", "msfp20"]
)
def test_unknown_names(text: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown number format"):
        parse_format(text)


def test_near_misses_are_offered() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'mxfp4'"):
        parse_format("mxpf4")


def test_block_sizes_change_where_they_may() -> None:
    assert with_block(parse_format("mxfp4"), 16).name == "mxfp4_e2m1{16}"
    assert with_block(parse_format("bfp[8|8]{64}"), 32).block == 32
    with pytest.raises(UnknownNameError, match="the block size of 'nvfp4' is not a choice"):
        with_block(parse_format("nvfp4"), 8)
