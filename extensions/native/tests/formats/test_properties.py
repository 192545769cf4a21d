"""What holds for every format, whatever the numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quark_native.formats import Format
from torch import Tensor

BLOCKS = ("mxfp8", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6", "mxfp4{8}", "mxint8", "bfp[8|8]{16}")
RANGES = (
    "int8/tensor",
    "int4/channel",
    "uint5/channel/asym",
    "int3/group:8/asym",
    "int8/group:16/power_of_two",
    "int16/token",
    "fp8_e4m3/channel",
    "fp6_e2m3/group:16",
    "fp4_e2m1/group:8/power_of_two",
)
GROUPS = (*BLOCKS, "int4/group:8", "int3/group:8/asym", "fp4_e2m1/group:8")


@st.composite
def tensors(draw: st.DrawFn, axes: int = 2, longest: int = 40) -> Tensor:
    """Tensors of mixed magnitudes with exact zeros, powers of two and repeated values."""
    shape = [draw(st.integers(1, longest if axis == axes - 1 else 5)) for axis in range(axes)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator)
    spread = draw(st.integers(0, 20))
    x *= torch.exp2(torch.randint(-spread, spread + 1, shape, generator=generator).float())
    x[torch.rand(shape, generator=generator) < 0.1] = 0.0
    coarse = torch.rand(shape, generator=generator) < 0.2
    x[coarse] = torch.exp2(torch.round(torch.log2(x[coarse].abs() + 1)))
    return x


@pytest.mark.parametrize("name", BLOCKS + RANGES)
@given(x=tensors())
def test_decoding_the_codes_is_fake_quantizing(name, x):
    fmt = Format.parse(name)
    before = x.clone()
    assert torch.equal(fmt.decode(fmt.encode(x)), fmt.fake_quantize(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", BLOCKS)
@given(x=tensors())
def test_block_formats_are_idempotent(name, x):
    fmt = Format.parse(name)
    once = fmt.fake_quantize(x)
    assert torch.equal(fmt.fake_quantize(once), once)
    assert torch.equal(fmt.encode(once).codes.abs(), fmt.encode(x).codes.abs())


@pytest.mark.parametrize("name", RANGES)
@given(x=tensors())
def test_with_the_same_scales_codes_are_idempotent(name, x):
    fmt = Format.parse(name)
    encoded = fmt.encode(x)
    again = fmt.encode(fmt.decode(encoded), encoded.parameters)
    assert torch.equal(fmt.decode(again), fmt.decode(encoded))


@pytest.mark.parametrize("name", [name for name in RANGES if "int" in name])
@given(x=tensors())
def test_integers_are_off_by_half_a_step_at_most(name, x):
    fmt = Format.parse(name)
    parameters = fmt.measure(x)
    step = fmt.layout.spread(parameters.scale, x.ndim).double()
    error = fmt.layout.split((fmt.fake_quantize(x).double() - x.double()).abs())
    # A rounded zero point moves one end of the range by up to half a step.
    slack = 1.0 if parameters.zero_point is None else 2.0
    rounding = fmt.layout.split(x.double().abs()) * 2.0**-22
    assert (error <= slack * step / 2 + rounding).all()


@pytest.mark.parametrize("name", [name for name in BLOCKS if name.startswith("mx")])
@given(x=tensors())
def test_microscaling_takes_the_nearest_value_of_its_block(name, x):
    fmt = Format.parse(name)
    codes = torch.arange(2**fmt.number.bits, dtype=torch.int32)
    if fmt.signed_codes:
        codes = codes - 2 ** (fmt.number.bits - 1) + 1
        codes = codes[:-1]
    elements = fmt._elements(codes, None)
    elements = elements[elements.isfinite()].double()
    scale = fmt.layout.spread(fmt.measure(x).scale, x.ndim).double()
    blocks, found = fmt.layout.split(x).double(), fmt.layout.split(fmt.fake_quantize(x)).double()
    distances = (blocks.unsqueeze(-1) - elements * scale.unsqueeze(-1)).abs()
    assert torch.equal((found - blocks).abs(), distances.min(-1).values)


@pytest.mark.parametrize("name", GROUPS)
@given(x=tensors())
def test_a_short_last_block_is_a_block_of_its_own(name, x):
    fmt = Format.parse(name)
    whole = x.shape[1] // fmt.layout.size * fmt.layout.size
    parts = [fmt.fake_quantize(part) for part in (x[:, :whole], x[:, whole:]) if part.numel()]
    assert torch.equal(fmt.fake_quantize(x), torch.cat(parts, 1))


@pytest.mark.parametrize("name", [*GROUPS, "int4/channel", "int8/channel/asym"])
@given(x=tensors(axes=3, longest=12), axis=st.integers(-3, 2))
def test_any_axis_is_the_last_one_moved(name, x, axis):
    moved = Format.parse(name, axis=-1).fake_quantize(x.movedim(axis, -1))
    assert torch.equal(Format.parse(name, axis=axis).fake_quantize(x), moved.movedim(-1, axis))


@pytest.mark.parametrize("name", BLOCKS + RANGES)
@given(x=tensors(axes=3, longest=12))
def test_strides_do_not_matter(name, x):
    fmt = Format.parse(name)
    transposed = x.transpose(0, 2)
    assert torch.equal(fmt.fake_quantize(transposed), fmt.fake_quantize(transposed.contiguous()))
    every_other = torch.stack([x, torch.full_like(x, 1e9)], -1)[..., 0]
    assert not every_other.is_contiguous() or x.numel() == 1
    assert torch.equal(fmt.fake_quantize(every_other), fmt.fake_quantize(x))
    assert torch.equal(fmt.encode(transposed).codes, fmt.encode(transposed.contiguous()).codes)


@pytest.mark.parametrize("name", BLOCKS + RANGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(x=tensors())
def test_half_precision_is_widened_first_and_rounded_last(name, dtype, x):
    fmt = Format.parse(name)
    narrow = x.clamp(-1000, 1000).to(dtype)
    assert torch.equal(fmt.fake_quantize(narrow), fmt.fake_quantize(narrow.float()).to(dtype))


@pytest.mark.parametrize("name", BLOCKS)
@given(x=tensors())
def test_negating_the_input_negates_the_output(name, x):
    fmt = Format.parse(name)
    assert torch.equal(fmt.fake_quantize(-x), -fmt.fake_quantize(x))


@pytest.mark.parametrize("name", BLOCKS + RANGES)
@given(x=tensors())
def test_stored_scales_restore_exactly(name, x):
    fmt = Format.parse(name)
    scale = fmt.measure(x).scale
    stored = fmt.store_scale(scale)
    assert stored.dtype == (torch.float32 if fmt.scale_format == "float32" else torch.uint8)
    assert torch.equal(fmt.restore_scale(stored), scale)


@pytest.mark.parametrize("name", BLOCKS + RANGES)
def test_an_empty_tensor_stays_empty(name):
    assert Format.parse(name).fake_quantize(torch.empty(0, 8)).shape == (0, 8)


@pytest.mark.parametrize("name", ["int4/channel", "int4/group:8", "mxfp4"])
def test_a_missing_axis_is_named(name):
    fmt = Format.parse(name, axis=2)
    with pytest.raises(ValueError, match=r"there is no axis 2 in a tensor of shape \[4, 8\]"):
        fmt.fake_quantize(torch.zeros(4, 8))
