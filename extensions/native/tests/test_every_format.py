"""Every format through the whole backend: quantize, measure, save, load."""

from __future__ import annotations

import pytest
import torch
from quark_native.config import NativeConfig
from quark_native.formats import Format
from quark_native.quantizer import NativeQuantizer
from torch import nn

from quark_core.formats import EXAMPLES, parse_format

FORMATS = [name for name in EXAMPLES if name != "float32"]
MORE = (
    "mxfp4/scale:even",
    "mxfp4/stochastic",
    "int8/narrow",
    "int4/block:4x8",
    "fp8_e4m3/unit",
    "ternary/group:16",
    "binary[unit]",
    "int8/toward_zero",
    "uint20/asym",
)


def model() -> nn.Sequential:
    torch.manual_seed(3)
    layers = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 32), nn.Linear(32, 5)
    )
    return layers.eval()


def batches() -> list[torch.Tensor]:
    return [torch.randn(4, 3, 8, 8) for _ in range(2)]


@pytest.mark.parametrize("name", [*FORMATS, *MORE])
def test_weights_in_every_format_survive_saving(name, tmp_path):
    quantizer = NativeQuantizer(NativeConfig(name="native", weight=name))
    quantized = quantizer.quantize(model(), batches())
    x = torch.randn(4, 3, 8, 8)
    result = quantized.module(x)
    assert result.isfinite().all()
    assert not torch.equal(result, model()(x))
    quantized.save(tmp_path)
    loaded = quantizer.load(model(), tmp_path)
    assert torch.equal(loaded.module(x), result)
    assert loaded.size_bytes() == quantized.size_bytes()
    assert [e.format for e in loaded.encodings()] == [e.format for e in quantized.encodings()]


@pytest.mark.parametrize("name", [*FORMATS, *MORE])
def test_inputs_in_every_format(name):
    if "block:" in name:
        pytest.skip("tiles are for weights")
    quantizer = NativeQuantizer(NativeConfig(name="native", weight=None, input=f"{name}/dynamic"))
    quantized = quantizer.quantize(model(), batches())
    result = quantized.module(torch.randn(4, 3, 8, 8))
    assert result.isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
def test_packed_size_is_what_the_name_promises(name):
    number = parse_format(name)
    quantizer = NativeQuantizer(NativeConfig(name="native", weight=name))
    quantized = quantizer.quantize(nn.Linear(256, 64, bias=False).eval(), [torch.randn(1, 256)])
    expected = number.packed_bytes((64, 256))
    overhead = 64 * 4 * 3  # float32 scales a channel, or one a tensor
    if number.family in ("sbfp", "block_log", "block_minifloat", "shared_microexponent", "lpbq"):
        overhead += 256 * 64 // (number.block or 1) * 4  # scales in whole bytes or words
    assert expected <= quantized.size_bytes() <= expected + overhead


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_block_or_stays_or_saturates(name, bad):
    fmt = Format.parse(name, axis=-1 if parse_format(name).block else None)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    x[1, 70] = bad
    found = fmt.fake_quantize(x)
    if fmt.scale_format == "unit" and not name.startswith("ternary"):
        low, high = fmt.limits(fmt.measure(torch.ones(4, 128)))
        if bad != bad:
            assert found[1, 70].isnan()
        else:
            assert found[1, 70] == (high if bad > 0 else low).flatten()[0]
        rest = found.clone()
        rest[1, 70] = 0
        assert rest.isfinite().all()
    else:
        assert found[1, 70].isnan()
        if fmt.number.block:
            assert found[0].isfinite().all()
            assert found[3].isfinite().all()
