"""The Triton kernels under Triton's interpreter equal the specification, bit for bit."""

from __future__ import annotations

import pytest
import torch
from quark_native.formats import Format
from quark_native.kernels import dispatch, gpu
from quark_native.kernels.dispatch import forced
from torch import Tensor

triton = pytest.importorskip("triton")

BLOCKS = (
    "mxfp8",
    "mxfp8_e5m2",
    "mxfp6_e3m2",
    "mxfp6",
    "mxfp4",
    "mxint8",
    "mxint4",
    "mxfp4{16}",
    "mxfp4{7}",
    "mxfp8/scale:even",
    "mxfp8/scale:ceil",
    "mxfp4/scale:rceil",
    "msfp12",
    "block_fp[6|8]{16}",
    "block_minifloat[8|4|8]{16}",
    "bfp[8|8]{64}",
    "bfp[4|8]{16}(_N)",
    "block_log[8|8]{16}",
    "nvfp4",
    "nvfp4_one_level",
)
GIVEN = (
    "int8/tensor",
    "int8/channel",
    "int8/channel:1/asym",
    "uint4/group:32/asym",
    "int8/block:4x32",
    "lpbq[4|8]{32}",
    "fixed[8,4]",
    "fp8_e4m3/tensor",
    "fp8_e5m2/channel",
    "fp[0|4|3]/channel",
    "denorm[8|4]",
    "log[6]",
    "binary",
    "binary[zero]/group:16",
    "ternary",
)
ROUNDED = tuple(
    f"{name}/{mode}"
    for name in ("mxfp8", "mxfp4", "mxint8", "nvfp4", "int8/channel", "fp8_e4m3/tensor")
    for mode in ("nearest_away", "toward_zero", "floor", "ceil", "stochastic")
)


def tensor(kind: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "bits":
        bits = torch.randint(-(1 << 31), (1 << 31) - 1, (32, 100), generator=generator)
        return bits.to(torch.int32).view(torch.float32).to(dtype)
    x = torch.randn(277, 64, generator=generator)
    if kind == "exponents":
        x = x.clamp(-1.99, 1.99) * torch.exp2(torch.arange(-149.0, 128.0)).unsqueeze(1)
    return x.to(dtype)


@pytest.mark.parametrize("name", [*BLOCKS, *GIVEN, *ROUNDED])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("bits", torch.float32),
        ("exponents", torch.float32),
        ("exponents", torch.bfloat16),
        ("normal", torch.float16),
    ],
)
@pytest.mark.parametrize("axis", [None, 0])
def test_equals_the_specification(name, kind, dtype, axis):
    if axis is not None and any(
        word in name for word in ("tensor", "block:", "[8,", "denorm", "log[6]")
    ):
        pytest.skip("has no axis")
    fmt, x = Format.parse(name, axis=axis), tensor(kind, dtype)
    parameters = fmt.measure(x.float()) if fmt.call().given else None
    with forced("triton"):
        found = fmt.fake_quantize(x, parameters, seed=11)
    expected = fmt.specification(x, parameters, seed=11)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    equal = (found.view(bits) == expected.view(bits)) | (found.isnan() & expected.isnan())
    if not equal.all():
        place = tuple((~equal).nonzero()[0].tolist())
        values = [float(part[place]) for part in (x, found, expected)]
        pytest.fail(f"{fmt} at {place}: {values[0]!r} became {values[1]!r}, not {values[2]!r}")


@pytest.mark.parametrize(
    "name", ["mxfp4", "mxfp6", "mxfp8", "mxint8", "mxint4", "mxfp4/stochastic"]
)
@pytest.mark.parametrize("kind", ["bits", "exponents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_equals_the_specification(name, kind, dtype):
    fmt, x = Format.parse(name), tensor(kind, dtype)[:, :64].contiguous()
    with forced("triton"):
        assert dispatch.pack(fmt, x) is not None
        found = fmt.quantize(x)
        values = found.dequantize(dtype)
    with forced("torch"):
        expected = fmt.quantize(x)
        torch.testing.assert_close(
            values, expected.dequantize(dtype), rtol=0, atol=0, equal_nan=True
        )
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.parts["scale"], expected.parts["scale"])


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8/toward_zero", "int8/tensor", "bfp[8|8]{64}"])
def test_tuning_tries_several_programs_and_changes_nothing(name, monkeypatch):
    tried = []

    def bench(kernel_call, quantiles):
        kernel_call()
        tried.append(1)
        return [float(len(tried))] * 3

    kernel = "given" if "int8" in name else "blocks"
    fmt = Format.parse(name)
    gpu.tuned.cache_clear()
    tuner = gpu.tuned(kernel, 1 if "int8" in name else fmt.layout.size)
    monkeypatch.setattr(tuner, "_do_bench", bench)
    monkeypatch.setattr(gpu, "_TUNED_FROM", 0)
    monkeypatch.setattr(gpu, "interpreted", lambda: False)
    monkeypatch.setattr(gpu, "refusal", lambda *_: None)
    x = torch.randn(8, 64)
    parameters = fmt.measure(x) if fmt.covers else None
    expected = fmt.specification(x, parameters)
    with forced("triton"):
        assert torch.equal(fmt.fake_quantize(x, parameters, out=x), expected)
    assert len(tried) == 12


def test_a_tensor_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert dispatch.choose(Format.parse("mxfp4"), torch.zeros(2, 32)).kernel == "cpu"
    with forced("triton"), pytest.raises(Exception, match="Triton computes on GPUs"):
        Format.parse("mxfp4").fake_quantize(torch.zeros(2, 32))
