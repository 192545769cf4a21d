"""Fake quantization of activations: gradients, observing, messages."""

from __future__ import annotations

import pytest
import torch
from quark_native.formats import Format, Parameters, format_for
from quark_native.quantizers import PackedParameter, TensorQuantizer, fake_quantize

from quark_core.errors import QuantizationError
from quark_core.spec import TensorSpec


def quantizer(text: str) -> TensorQuantizer:
    spec = TensorSpec.model_validate(text).resolve("input")
    return TensorQuantizer(spec, format_for(spec), "fc.input")


@pytest.mark.parametrize("symmetry", ["sym", "asym"])
def test_values_and_gradient_are_aimets(symmetry, golden):
    vectors, case = golden("affine"), f"grad-w4-{symmetry}"
    fmt = Format.parse(f"{'' if symmetry == 'sym' else 'u'}int4/channel/{symmetry}")
    low, high = vectors[f"{case}/min"].squeeze(1), vectors[f"{case}/max"].squeeze(1)
    scale = (high - low) / 15
    zero_point = None if symmetry == "sym" else torch.round(-low / scale).int()
    x = vectors[f"{case}/x"].clone().requires_grad_()
    y = fake_quantize(x, fmt, Parameters(scale, zero_point))
    torch.testing.assert_close(y, vectors[f"{case}/qdq"], rtol=1e-5, atol=1e-6)
    (y * vectors[f"{case}/g"]).sum().backward()
    torch.testing.assert_close(x.grad, vectors[f"{case}/grad_x"], rtol=1e-5, atol=0)


def test_the_gradient_stops_where_values_clip():
    fmt, one = Format.parse("int4/tensor"), Parameters(torch.tensor(1.0))
    x = torch.tensor([-8.6, -8.4, 0.3, 7.4, 7.6], requires_grad=True)
    fake_quantize(x, fmt, one).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    x = torch.tensor([-449.0, -448.0, 448.0, 449.0], requires_grad=True)
    fake_quantize(x, Format.parse("fp8/tensor"), one).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("name", ["mxfp4", "int4/group:8", "bfp[4|8]{8}"])
def test_the_gradient_of_measured_scales_passes_everywhere(name):
    x = torch.randn(3, 20, requires_grad=True)
    gradient = torch.randn(3, 20)
    fake_quantize(x, Format.parse(name)).backward(gradient)
    assert torch.equal(x.grad, gradient)


def test_a_static_quantizer_observes_and_then_quantizes():
    found, x = quantizer("int8"), torch.randn(4, 8)
    assert torch.equal(found(x), x)
    found.freeze()
    fmt = found.format
    assert torch.equal(found(2 * x), fmt.fake_quantize(2 * x, fmt.measure(x)))


def test_a_dynamic_quantizer_waits_until_it_is_ready():
    found, x = quantizer("int8/token/dynamic"), torch.randn(4, 8)
    assert torch.equal(found(x), x)
    found.freeze()
    assert torch.equal(found(x), found.format.fake_quantize(x))


def test_a_range_never_observed_names_the_tensor():
    with pytest.raises(QuantizationError, match=r"tensor 'fc.input': no value was observed"):
        quantizer("int8").freeze()


def test_a_missing_axis_names_the_tensor():
    found = quantizer("int8/group:8@3/dynamic")
    found.freeze()
    with pytest.raises(
        QuantizationError, match=r"tensor 'fc.input': there is no axis 3 .*another granularity"
    ):
        found(torch.randn(4, 8))


@pytest.mark.parametrize("name", ["int3/channel", "uint5/group:6/asym", "mxfp6", "fp8_e5m2/tensor"])
def test_packed_tensors_restore_from_what_is_stored(name):
    fmt, x = Format.parse(name), torch.randn(5, 17)
    packed = PackedParameter.of(fmt.encode(x), fmt)
    assert torch.equal(packed.decode(torch.float32), fmt.fake_quantize(x))
    restored = PackedParameter(fmt, (5, 17))
    restored.restore(packed.stored())
    assert torch.equal(restored.decode(torch.float32), fmt.fake_quantize(x))
