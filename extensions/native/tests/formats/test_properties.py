"""What holds for every format, whatever the numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quark_native.formats import Format
from quark_native.packed import PackedTensor
from torch import Tensor

BLOCKS = (
    "mxfp8",
    "mxfp8_e5m2",
    "mxfp6_e3m2",
    "mxfp6",
    "mxfp4{8}",
    "mxint8",
    "bfp[8|8]{16}",
    "msfp12",
    "block_fp[6|8]{8}",
    "block_minifloat[8|4|8]{16}",
    "mx6",
    "mx9",
)
OTHERS = (
    "bfp[4|8]{16}(_N)",
    "bfp16",
    "nvfp4",
    "nvfp4_one_level",
    "sbfp[4|4|4]{16}",
    "lpbq[4|8]{8}",
    "lpbq[2|4]{16}",
    "block_log[6|8]{16}",
    "log[6]",
    "log[8,20]",
    "fixed[8,4]",
    "ufixed[6,2]",
    "denorm[8|4]",
    "fp[1|4|3](ieee)/unit",
    "fp[1|3|4](flush)/unit",
    "float16/unit",
    "bfloat16/unit",
    "int8/narrow",
    "int4/block:2x4",
    "uint4/block:3x2/asym",
    "int32/channel",
    "uint32/tensor/asym",
    "binary",
    "binary[unit]/tensor",
    "binary[zero]/group:8",
    "binary_residual/group:8",
    "binary_residual[3]/channel",
    "ternary",
    "ternary[unit]/tensor",
    "ternary/block:2x8",
    "mxfp4/scale:even",
    "mxfp8/scale:ceil",
    "mxint8/scale:rceil",
    "mxfp6/toward_zero",
    "int8/floor",
    "int4/group:8/nearest_away",
    "mxfp4/stochastic",
)
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


@pytest.mark.parametrize("name", BLOCKS + RANGES + OTHERS)
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
    size = fmt.number.block or fmt.layout.size
    whole = x.shape[1] // size * size
    parts = [fmt.fake_quantize(part) for part in (x[:, :whole], x[:, whole:]) if part.numel()]
    assert torch.equal(fmt.fake_quantize(x), torch.cat(parts, 1))


@pytest.mark.parametrize("name", [*GROUPS, "int4/channel", "int8/channel/asym"])
@given(x=tensors(axes=3, longest=12), axis=st.integers(-3, 2))
def test_any_axis_is_the_last_one_moved(name, x, axis):
    moved = Format.parse(name, axis=-1).fake_quantize(x.movedim(axis, -1))
    assert torch.equal(Format.parse(name, axis=axis).fake_quantize(x), moved.movedim(-1, axis))


@pytest.mark.parametrize("name", BLOCKS + RANGES + OTHERS)
@given(x=tensors(axes=3, longest=12))
def test_strides_do_not_matter(name, x):
    fmt = Format.parse(name)
    transposed = x.transpose(0, 2)
    assert torch.equal(fmt.fake_quantize(transposed), fmt.fake_quantize(transposed.contiguous()))
    every_other = torch.stack([x, torch.full_like(x, 1e9)], -1)[..., 0]
    assert not every_other.is_contiguous() or x.numel() == 1
    assert torch.equal(fmt.fake_quantize(every_other), fmt.fake_quantize(x))
    assert torch.equal(fmt.encode(transposed).codes, fmt.encode(transposed.contiguous()).codes)


@pytest.mark.parametrize("name", BLOCKS + RANGES + OTHERS)
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


@pytest.mark.parametrize("name", BLOCKS + RANGES + OTHERS)
@given(x=tensors())
def test_stored_scales_restore_exactly(name, x):
    fmt = Format.parse(name)
    parameters = fmt.measure(x)
    stored = fmt.store(parameters)
    assert "scale" in stored or fmt.scale_format == "unit"
    restored = fmt.restore(stored, tuple(x.shape))
    assert torch.equal(restored.scale, parameters.scale)


@pytest.mark.parametrize("name", BLOCKS + RANGES + OTHERS)
@given(x=tensors())
def test_packed_tensors_hold_the_quantized_values_and_survive_a_file(name, x, tmp_path_factory):
    packed = Format.parse(name).quantize(x)
    expected = Format.parse(name).fake_quantize(x)
    assert torch.equal(packed.dequantize(), expected)
    file = tmp_path_factory.mktemp("packed") / "x.safetensors"
    packed.save(file)
    loaded = PackedTensor.load(file)
    assert torch.equal(loaded.dequantize(), expected)
    assert loaded.nbytes == packed.nbytes
    assert str(loaded.format) == str(packed.format)


@pytest.mark.parametrize("name", BLOCKS + RANGES + OTHERS)
def test_an_empty_tensor_stays_empty(name):
    fmt = Format.parse(name)
    assert fmt.fake_quantize(torch.empty(0, 8)).shape == (0, 8)
    assert fmt.quantize(torch.empty(0, 8)).dequantize().shape == (0, 8)


@pytest.mark.parametrize("name", BLOCKS + RANGES + OTHERS)
def test_integers_are_no_values(name):
    fmt = Format.parse(name)
    for act in (fmt.fake_quantize, fmt.encode, fmt.quantize):
        with pytest.raises(TypeError, match="quantizes floating-point tensors, not torch.int64"):
            act(torch.ones(4, 8, dtype=torch.int64))


@pytest.mark.parametrize("name", ["int4/channel", "int4/group:8", "mxfp4"])
def test_a_missing_axis_is_named(name):
    fmt = Format.parse(name, axis=2)
    with pytest.raises(ValueError, match=r"there is no axis 2 in a tensor of shape \[4, 8\]"):
        fmt.fake_quantize(torch.zeros(4, 8))
