"""Every kind of layer in every mode against arithmetic written out by hand."""

from __future__ import annotations

import pytest
import torch
from quark_native import nn as qnn
from quark_native.config import NativeConfig
from quark_native.quantizer import NativeQuantizer
from torch import Tensor, nn
from torch.nn import functional

LAYERS = {
    # name: (layer, a batch, the axis of the weight's output channels, the class it becomes)
    "linear": (
        lambda: nn.Linear(12, 5),
        lambda: torch.randn(7, 12),
        0,
        qnn.QuantizedLinear,
    ),
    "conv1d": (
        lambda: nn.Conv1d(6, 4, 3, padding=1, padding_mode="circular", stride=2),
        lambda: torch.randn(2, 6, 11),
        0,
        qnn.QuantizedConv1d,
    ),
    "conv2d": (
        lambda: nn.Conv2d(6, 4, (3, 2), groups=2, dilation=2, bias=False),
        lambda: torch.randn(2, 6, 9, 8),
        0,
        qnn.QuantizedConv2d,
    ),
    "conv_transpose1d": (
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1),
        lambda: torch.randn(2, 4, 9),
        1,
        qnn.QuantizedConvTranspose1d,
    ),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
        lambda: torch.randn(2, 4, 5, 6),
        1,
        qnn.QuantizedConvTranspose2d,
    ),
    "embedding": (
        lambda: nn.Embedding(20, 12, padding_idx=3),
        lambda: torch.randint(0, 20, (3, 6)),
        0,
        qnn.QuantizedEmbedding,
    ),
}


def int8_per_channel(weight: Tensor, axis: int) -> Tensor:
    """Symmetric int8 with the full range, one scale for each index of ``axis``."""
    others = [dim for dim in range(weight.ndim) if dim != axis]
    high = weight.amax(others, keepdim=True).clamp(min=0).double() / 127
    low = weight.amin(others, keepdim=True).clamp(max=0).double() / -128
    scale = torch.maximum(high, low).float().clamp(min=2.0**-126)  # a row may be zero
    return (weight / scale).round().clamp(-128, 127) * scale


def uint8_per_tensor(x: Tensor, low: float, high: float) -> Tensor:
    """Asymmetric uint8 for the range [low, high]."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = torch.tensor((high - low) / 255, dtype=torch.float64).float()
    zero_point = round(-low / scale.item())
    codes = ((x / scale).round() + zero_point).clamp(0, 255)
    return (codes - zero_point) * scale


def with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """A float layer that computes with another weight."""
    layer.weight.data = weight
    return layer


def quantize(layer: nn.Module, batches: list[Tensor] | None, **config: object):
    model = nn.Sequential(layer)
    return NativeQuantizer(NativeConfig(name="native", **config)).quantize(model, batches)


@pytest.fixture(params=LAYERS)
def kind(request):
    return request.param


@pytest.fixture
def case(kind):
    make, batch, axis, cls = LAYERS[kind]
    torch.manual_seed(1)
    return make().eval(), batch, axis, cls


def test_weight_only(case):
    layer, batch, axis, cls = case
    x = batch()
    quantized = quantize(layer, None, weight="int8/channel")
    assert type(quantized.layer("0")) is cls
    assert isinstance(quantized.layer("0"), type(layer))
    reference = with_weight(layer, int8_per_channel(layer.weight.detach(), axis))
    assert torch.equal(quantized(x), reference(x))


def test_static(kind, case):
    layer, batch, axis, _ = case
    batches = [batch() for _ in range(3)]
    output = "uint8/tensor/asym" if kind == "embedding" else None
    quantized = quantize(
        layer, batches, weight="int8/channel", input="uint8/tensor/asym", output=output
    )
    x = batch() * 2  # beyond the calibrated range, so that values clip
    if kind == "embedding":
        x = batch()
        outputs = torch.stack([layer(b) for b in batches])
        low, high = outputs.min().item(), outputs.max().item()
        reference = with_weight(layer, int8_per_channel(layer.weight.detach(), axis))
        expected = uint8_per_tensor(reference(x), low, high)
    else:
        low = min(b.min().item() for b in batches)
        high = max(b.max().item() for b in batches)
        reference = with_weight(layer, int8_per_channel(layer.weight.detach(), axis))
        expected = reference(uint8_per_tensor(x, low, high))
    assert torch.equal(quantized(x), expected)


def test_dynamic(kind, case):
    layer, batch, axis, _ = case
    spec = "uint8/tensor/asym/dynamic"
    role = "output" if kind == "embedding" else "input"
    quantized = quantize(layer, None, weight="int8/channel", **{role: spec})
    assert not quantized.plan.needs_calibration
    for scale in (1, 10):
        x = batch() if kind == "embedding" else batch() * scale
        reference = with_weight(layer, int8_per_channel(layer.weight.detach(), axis))
        if kind == "embedding":
            y = reference(x)
            expected = uint8_per_tensor(y, y.min().item(), y.max().item())
        else:
            expected = reference(uint8_per_tensor(x, x.min().item(), x.max().item()))
        assert torch.equal(quantized(x), expected)


def test_blocks_run_along_the_input_channels(kind, case):
    layer, batch, axis, _ = case
    quantized = quantize(layer, None, weight="mxint8{4}", input="mxint8{4}")
    inputs = 1 - axis

    def blocks(x: Tensor, dim: int) -> Tensor:
        parts = []
        for part in x.split(4, dim):
            largest = part.abs().amax(dim, keepdim=True)
            step = torch.exp2(torch.floor(torch.log2(largest.double())) - 6)
            step = step.clamp(min=2.0**-126).float()  # a row may be zero
            parts.append((part / step).round().clamp(-127, 127) * step)
        return torch.cat(parts, dim)

    x = batch()
    reference = with_weight(layer, blocks(layer.weight.detach(), inputs))
    features = x if kind == "embedding" else blocks(x, -1 if kind == "linear" else 1)
    assert torch.equal(quantized(x), reference(features))


def test_bias():
    layer, x = nn.Linear(12, 5), torch.randn(4, 12)
    quantized = quantize(layer, None, weight=None, bias="int4/tensor")
    bias = layer.bias.detach()
    scale = torch.maximum(bias.max().double() / 7, bias.min().double() / -8).float()
    expected = functional.linear(x, layer.weight, (bias / scale).round().clamp(-8, 7) * scale)
    assert torch.equal(quantized(x), expected)
    assert [encoding.tensor for encoding in quantized.encodings()] == ["0.bias"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", ["int8/channel", "int16/tensor", "mxfp4", "bfp[8|8]{16}"])
def test_half_precision_models_stay_so(dtype, weight):
    layer = nn.Linear(40, 8, bias=False).to(dtype)
    batches = [torch.randn(4, 40, dtype=dtype) for _ in range(2)]
    quantized = quantize(layer, batches, weight=weight, input="int8")
    y = quantized(batches[0])
    assert y.dtype == quantized.layer("0").weight.dtype == dtype
    assert y.isfinite().all()
    assert quantized.encodings()[0].scale.dtype == torch.float32


def test_a_subclass_keeps_its_own_forward():
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer, x = Doubling(12, 5), torch.randn(4, 12)
    quantized = quantize(layer, None, weight="int8/channel")
    assert isinstance(quantized.layer("0"), Doubling)
    assert qnn.quantized_class(Doubling) is qnn.quantized_class(Doubling)
    weight = int8_per_channel(layer.weight.detach(), 0)
    assert torch.equal(quantized(x), 2 * functional.linear(x, weight, layer.bias))


def test_a_keyword_argument_is_quantized_too():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    x = torch.randn(4, 12)
    config = NativeConfig(name="native", input="uint8/tensor/asym/dynamic")
    model = Model()
    quantized = NativeQuantizer(config).quantize(model)
    expected = model.layer(uint8_per_tensor(x, x.min().item(), x.max().item()))
    assert torch.equal(quantized(x), expected)


def test_the_description_names_the_specs():
    quantized = quantize(nn.Linear(12, 5), None, weight="int4/group:4")
    text = repr(quantized.layer("0"))
    assert "in_features=12, out_features=5, bias=True, weight=int4/group:4/sym" in text


def test_casting_the_model_keeps_scales_exact():
    quantized = quantize(nn.Linear(12, 5), [torch.randn(4, 12)], weight="int8", input="int8")
    before = [encoding.scale.clone() for encoding in quantized.encodings()]
    quantized.module.to(torch.bfloat16)
    after = [encoding.scale for encoding in quantized.encodings()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert quantized.layer("0").weight.dtype == torch.bfloat16
    assert quantized(torch.randn(4, 12).bfloat16()).dtype == torch.bfloat16


def test_the_state_dict_holds_codes_instead_of_weights():
    quantized = quantize(nn.Linear(12, 5), None, weight="int4/channel")
    state = quantized.module.state_dict()
    assert sorted(state) == ["0.bias", "0.packed.weight.codes", "0.packed.weight.scale"]
    assert state["0.packed.weight.codes"].numel() == 30


def test_a_state_dict_restores_the_weights():
    one, other = (
        quantize(nn.Linear(12, 5), [torch.ones(1, 12)], weight="int4/channel/asym", input="int8")
        for _ in range(2)
    )
    x = torch.randn(4, 12)
    assert not torch.equal(one(x), other(x))
    other.module.load_state_dict(one.module.state_dict())
    assert torch.equal(one(x), other(x))
