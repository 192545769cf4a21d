"""Which kernel is chosen, and that a choice can be forced."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from quark_native.formats import Format, Parameters
from quark_native.kernels import library
from quark_native.kernels.diagnostics import diagnostics
from quark_native.kernels.dispatch import choose, forced

from quark_core.errors import QuantizationError

compiled = pytest.mark.skipif(library.load()[0] is None, reason=library.load()[1])
X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


@compiled
@pytest.mark.parametrize(
    ("name", "x", "kernel", "why"),
    [
        ("mxfp4", X, "cpu", "the tensor is on cpu"),
        ("mxfp4", X.double(), "torch", "no kernel for torch.float64"),
        ("mx9", X, "torch", "no kernel for mx9 with rounding nearest_even"),
        ("bfp[8|8]{16}(SD)", X, "torch", r"no kernel for bfp\[8\|8\]\{16\}\(SD\) with rounding"),
        ("int32/channel", X, "torch", "no kernel for int32"),
        ("mxfp4{4000}", X, "torch", "blocks of more than 2048 elements"),
        ("int8/block:3x2", torch.zeros(2, 4, 4), "torch", "tiles that do not divide the tensor"),
    ],
)
def test_the_choice_and_its_reason(name, x, kernel, why):
    fmt = Format.parse(name)
    choice = choose(fmt, x)
    assert choice.kernel == kernel
    assert re.search(why, choice.why)
    assert torch.equal(fmt.fake_quantize(x), fmt.specification(x))


def test_given_scales_of_a_block_format_are_left_to_the_specification():
    fmt = Format.parse("mxfp4")
    parameters = Parameters(torch.full((4, 2), 0.0625))
    assert choose(fmt, X, parameters).kernel == "torch"
    found = fmt.fake_quantize(X, parameters)
    assert torch.equal(found, fmt.specification(X, parameters))
    assert not torch.equal(found, fmt.fake_quantize(X))


@compiled
def test_forcing_what_cannot_be_is_an_error():
    with forced("cpu"), pytest.raises(QuantizationError, match="kernel cpu cannot compute mx9: no"):
        Format.parse("mx9").fake_quantize(X)
    with forced("torch"):
        assert choose(Format.parse("mxfp4"), X).kernel == "torch"
    with (
        pytest.raises(QuantizationError, match="there is no kernel 'cup'.*Did you mean 'cpu'"),
        forced("cup"),
    ):
        pass


def test_the_environment_forces_a_kernel():
    program = (
        "import torch; from quark_native.formats import Format; from quark_native.kernels.dispatch "
    )
    program += "import choose; print(choose(Format.parse('mxfp4'), torch.zeros(2, 32)).kernel)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "QUARK_NATIVE_KERNEL": "torch"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "torch"


@compiled
def test_doctor_names_the_kernel():
    (cpu, gpu) = diagnostics()
    assert cpu.value.startswith(f"compiled, {library.load()[1]}, ")
    assert cpu.ok
    assert gpu.name == "kernels on gpu"


@pytest.mark.parametrize("name", ["int8/channel", "mxfp4"])
def test_a_launch_is_remembered_only_while_it_holds(name):
    fmt = Format.parse(name)
    parameters = fmt.measure(X) if fmt.covers else None
    first = fmt.fake_quantize(X, parameters)
    assert torch.equal(fmt.fake_quantize(X * 3, parameters), fmt.specification(X * 3, parameters))
    if parameters is not None:
        other = Parameters(parameters.scale * 2)
        assert torch.equal(fmt.fake_quantize(X, other), fmt.specification(X, other))
        parameters.scale.mul_(4)
        assert torch.equal(fmt.fake_quantize(X, parameters), fmt.specification(X, parameters))
    with forced("torch"):
        assert fmt.fake_quantize(X[:2], parameters if name == "mxfp4" else None).shape == (2, 64)
    for twin in (copy.deepcopy(fmt), pickle.loads(pickle.dumps(fmt))):
        assert not twin.launches
        assert torch.equal(twin.fake_quantize(X), fmt.fake_quantize(X))
    assert first.shape == X.shape


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(4, 63), r"out must be contiguous, of shape \[4, 64\]"),
        (torch.empty(4, 64, dtype=torch.float16), "torch.float32, on cpu; it is of shape"),
        (torch.empty(64, 4).t(), "out must be contiguous"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(out, message):
    with pytest.raises(ValueError, match=message):
        Format.parse("mxfp4").fake_quantize(X, out=out)


def test_without_a_library_torch_computes_and_doctor_says_why(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: (None, "it was not built: no C++17 compiler"))
    fmt = Format.parse("mxfp4")
    choice = choose(fmt, X)
    assert choice.kernel == "torch"
    assert choice.why == "no compiled library: it was not built: no C++17 compiler"
    assert torch.equal(fmt.fake_quantize(X), fmt.specification(X))
    assert fmt.quantize(X).dequantize().shape == X.shape
    (cpu, _) = diagnostics()
    assert "about eight times slower" in cpu.value
    assert "pip install" in cpu.fix


@pytest.mark.parametrize("name", ["int8/channel", "int4/group:8", "fp8_e4m3/channel"])
def test_scales_of_another_shape_are_refused_before_memory_is_read(name):
    fmt = Format.parse(name)
    parameters = fmt.measure(X)
    with pytest.raises(ValueError, match=r"scales, and a tensor of shape \[6, 64\] needs"):
        fmt.fake_quantize(torch.randn(6, 64), parameters)
    meta = Parameters(parameters.scale.to("meta"))
    with pytest.raises(ValueError, match="the scales are on meta, and the tensor is on cpu"):
        fmt.fake_quantize(X, meta)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "bfp[8|8]{16}", "int8/channel"])
@pytest.mark.parametrize("damage", ["codes", "scale"])
def test_a_packed_tensor_with_too_few_bytes_is_refused(name, damage):
    packed = Format.parse(name).quantize(X)
    if damage == "codes":
        broken = replace(packed, codes=packed.codes[:-3])
    else:
        broken = replace(packed, parts={"scale": packed.parts["scale"].flatten()[:-1]})
    with pytest.raises(
        (QuantizationError, RuntimeError), match="has not the codes and scales|size"
    ):
        broken.dequantize()
