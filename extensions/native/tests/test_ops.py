"""The operator that compilers see, and learned scales."""

from __future__ import annotations

import math

import pytest
import torch
from quark_native.formats import Format
from quark_native.learned import LearnedQuantizer
from quark_native.ops import fake_quantize
from quark_native.quantizers import TensorQuantizer
from torch import nn

from quark_core.spec import TensorSpec

NAMES = (
    "mxfp4",
    "bfp[8|8]{16}",
    "int8/channel",
    "uint4/group:8/asym",
    "fp8_e4m3/tensor",
    "ternary",
)


class Model(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.format = Format.parse(name)
        self.parameters_ = self.format.measure(torch.randn(6, 32)) if self.format.covers else None

    def forward(self, x):
        return torch.relu(fake_quantize(x * 2, self.format, self.parameters_))


@pytest.mark.parametrize("name", NAMES)
def test_export_sees_one_operator_and_gives_the_same(name):
    model, x = Model(name), torch.randn(6, 32)
    program = torch.export.export(model, (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert "quark_native.fake_quantize.default" in targets
    assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("given", [False, True])
def test_the_operator_keeps_torchs_contract(name, given):
    fmt, x = Format.parse(name), torch.randn(6, 32, requires_grad=True)
    known = fmt.measure(x.detach()) if given and fmt.covers else None
    scale, zero_point = (None, None) if known is None else (known.scale, known.zero_point)
    arguments = (x, *fmt.spelling, scale, zero_point, None, 0)
    # Gradients are straight-through by intention, so they are compared below, not numerically.
    torch.library.opcheck(torch.ops.quark_native.fake_quantize.default, arguments)


@pytest.mark.parametrize("name", ["int8/channel", "mxfp4", "fp8_e4m3/tensor"])
def test_compiled_and_eager_gradients_are_alike(name):
    model = Model(name)
    x = (torch.randn(6, 32) * 3).requires_grad_()
    compiled = torch.compile(model, backend="aot_eager")
    weight = torch.randn(6, 32)
    (expected,) = torch.autograd.grad((model(x) * weight).sum(), x)
    (found,) = torch.autograd.grad((compiled(x) * weight).sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (expected == 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_pass_straight_through_a_format_itself(name):
    x = torch.randn(6, 32, requires_grad=True)
    y = Format.parse(name).fake_quantize(x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(6, 32))
    assert torch.equal(y.detach(), Format.parse(name).specification(x.detach()))


def test_a_compiled_function_sees_the_operator():
    fmt = Format.parse("mxfp4")
    compiled = torch.compile(
        lambda x: fmt.fake_quantize(x) + 1, backend="aot_eager", fullgraph=True
    )
    x = torch.randn(4, 64)
    assert torch.equal(compiled(x), fmt.fake_quantize(x) + 1)


def test_stochastic_rounding_follows_torchs_seed():
    spec = TensorSpec.model_validate("mxfp4/stochastic").resolve("input")
    quantizer = TensorQuantizer(spec, Format.parse("mxfp4/stochastic", role="input"), "x")
    quantizer.freeze()
    x = torch.randn(8, 64)
    torch.manual_seed(5)
    first, second = quantizer(x), quantizer(x)
    torch.manual_seed(5)
    assert torch.equal(quantizer(x), first)
    assert not torch.equal(first, second)


def test_stochastic_rounding_is_unbiased():
    fmt = Format.parse("int8/tensor/stochastic")
    x = torch.full((200, 500), 0.3)
    x[0, 0] = 127.0
    mean = fmt.fake_quantize(x, seed=1)[1:].mean()
    assert mean == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / x.numel()))


@pytest.mark.parametrize(
    "name", ["int4/channel", "uint4/tensor/asym", "int4/group:8", "fp4_e2m1/channel"]
)
def test_learned_scale_has_the_papers_gradient(name):
    fmt = Format.parse(name)
    example = torch.randn(6, 32)
    quantizer = LearnedQuantizer(fmt, example)
    with torch.no_grad():
        quantizer.scale *= 0.6  # so that some values are clipped
    x, weight = example.clone().requires_grad_(), torch.randn(6, 32)
    (quantizer(x) * weight).sum().backward()

    low, high = fmt.element_limits
    scale = fmt.layout.spread(quantizer.scale.detach(), 2)
    blocks = fmt.layout.split(example)
    point = 0 if quantizer.zero_point is None else fmt.layout.spread(quantizer.zero_point, 2)
    v, q = blocks / scale, fmt.layout.split(quantizer(x).detach()) / scale
    inside = (v.round() >= low - point) & (v.round() <= high - point)
    if "fp4" in name:
        inside = v.abs() <= high
    slope = torch.where(inside, q - v, q)
    count = x.numel() // quantizer.scale.numel()
    total = (fmt.layout.split(weight) * slope).sum(fmt.layout.shared_axes(2))
    expected = total.reshape(quantizer.scale.shape) / math.sqrt(count * max(-low, high))
    torch.testing.assert_close(quantizer.scale.grad, expected)
    torch.testing.assert_close(x.grad, weight * fmt.layout.join(inside, (6, 32)))
    assert not inside.all()


def test_learning_the_scale_lowers_the_error():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    quantizer = LearnedQuantizer(Format.parse("int3/tensor"), x)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    errors = []
    for _ in range(200):
        loss = (quantizer(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(loss))
    assert errors[-1] < 0.6 * errors[0]


def test_formats_that_find_their_scales_have_none_to_learn():
    with pytest.raises(ValueError, match="mxfp4_e2m1 finds its scales itself"):
        LearnedQuantizer(Format.parse("mxfp4"), torch.randn(2, 32))
