"""AWQ picks the factors that its formula says, and what they cost and bring is as it should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quark_brevitas import preparation
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

from quark_core.errors import ConfigError, QuantizationError

WIDTH = 64
STEPS = 8


def _quantizer(**fields: Any) -> BrevitasQuantizer:
    given = {"weight": "int4/group:16/asym", "awq": {"steps": STEPS}, **fields}
    return BrevitasQuantizer(BrevitasConfig(name="brevitas", **given))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 32)).eval()


@pytest.fixture
def batches() -> list[Tensor]:
    """Tokens in which a few channels are far larger than the others."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.ones(WIDTH)
    sizes[::9] = 30.0
    return [torch.randn(4, 16, WIDTH, generator=generator) * sizes for _ in range(3)]


def _sqnr(truth: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(truth.square().sum() / (truth - found).square().sum()))


def test_the_factor_is_the_one_with_the_smallest_error(
    model: nn.Module, batches: list[Tensor]
) -> None:
    quantizer = _quantizer()
    found = quantizer.quantize(model, batches).module.get_submodule("0").scale.weight
    entry = quantizer.plan(model, None)["0"]
    x, weight = torch.cat(batches).reshape(-1, WIDTH), model[0].weight.detach()
    errors = {}
    for step in range(STEPS):
        factor = x.abs().sum(0) ** (step / STEPS)
        factor = factor / (factor.max() * factor.min()).sqrt()
        rounded = preparation.rounded(weight * factor, entry, quantizer.config)
        errors[step] = (float(((x / factor) @ rounded.T - x @ weight.T).square().sum()), factor)
    best = min(errors, key=lambda step: errors[step][0])
    assert best > 0
    assert torch.allclose(found, 1 / errors[best][1], rtol=1e-4)


def test_it_helps_where_few_channels_are_large(model: nn.Module, batches: list[Tensor]) -> None:
    with torch.no_grad():
        truth = model(batches[0])
        plain = _sqnr(truth, _quantizer(awq=None).quantize(model)(batches[0]))
        scaled = _sqnr(truth, _quantizer().quantize(model, batches)(batches[0]))
    assert scaled > plain + 1


def test_float_outputs_stay(model: nn.Module, batches: list[Tensor]) -> None:
    quantized = _quantizer().quantize(model, batches)
    for name in ("0", "2"):
        quantized.set_enabled(name, enabled=False)
    assert torch.allclose(quantized(batches[0]), model(batches[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "more", [{}, {"input": "int8"}, {"algorithm": "gptq"}, {"low_rank": {"rank": 4}}, {"magr": {}}]
)
def test_loaded_models_compute_the_same(
    model: nn.Module, batches: list[Tensor], more: dict[str, Any], tmp_path: Path
) -> None:
    quantizer = _quantizer(**more)
    quantized = quantizer.quantize(model, batches)
    quantized.save(tmp_path)
    loaded = quantizer.restore(model, tmp_path)
    assert torch.equal(loaded(batches[0]), quantized(batches[0]))


def test_an_interrupted_run_has_the_same_factors(
    model: nn.Module, batches: list[Tensor], tmp_path: Path
) -> None:
    quantizer = _quantizer()
    first = quantizer.quantize(model, batches, partial=tmp_path)
    # Other data would give other factors, if it were asked.
    again = quantizer.quantize(model, [batch.flip(-1) for batch in batches], partial=tmp_path)
    assert torch.equal(first(batches[0]), again(batches[0]))


def test_planned_and_refused(model: nn.Module) -> None:
    plan = _quantizer().plan(model)
    steps = [step.name for step in plan.steps]
    assert steps.index("awq") < steps.index("layerwise rewriting")
    assert plan.needs_calibration
    with pytest.raises(QuantizationError, match="none is quantized"):
        _quantizer(weight="int4/channel").plan(nn.Sequential(nn.Conv2d(3, 8, 3)))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"weight": None}, "no weight is quantized"),
        ({"backend": "fx", "weight": "int4/channel", "input": "int8/sym"}, "backend: layerwise"),
        ({"activation_equalization": {}}, "leave one of them out"),
    ],
)
def test_refused_before_any_model(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        _quantizer(**fields)
