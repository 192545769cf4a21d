"""The Python face."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import quark_core
from quark_core.errors import AccuracyGateError, ConfigError, UnknownNameError

Write = Callable[..., Path]


@pytest.fixture
def model() -> torch.nn.Module:
    """Two linear layers."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))


@pytest.mark.parametrize("name", ["native", "brevitas"])
def test_quantize_by_name(model: torch.nn.Module, name: str) -> None:
    batches = [torch.randn(16, 8) for _ in range(3)]
    config = {"name": name, "weight": "int8/channel", "input": "int8"}
    quantized = quark_core.quantize(model, config, calibration=batches)
    error = (quantized(batches[0]) - model(batches[0])).abs().max()
    assert 0 < error < 0.1
    assert quantized.size_bytes() < sum(p.numel() * 4 for p in model.parameters())


def test_quantize_with_a_configuration(model: torch.nn.Module) -> None:
    quantizer = quark_core.get_quantizer("native")
    config = quantizer.config_class(name="native", weight="mxfp4")
    assert quark_core.quantize(model, config).encodings()[0].format == "mxfp4_e2m1"


def test_names() -> None:
    assert {"native", "brevitas"} <= set(quark_core.list_quantizers())
    with pytest.raises(UnknownNameError, match="Did you mean 'native'"):
        quark_core.get_quantizer("nativ")


def test_configuration_without_a_name(model: torch.nn.Module) -> None:
    with pytest.raises(ConfigError, match="name: required but missing: name a backend"):
        quark_core.quantize(model, {"weight": "int8"})
    with pytest.raises(ConfigError, match="configuration: is a str: give a mapping such as"):
        quark_core.quantize(model, "native")  # type: ignore[arg-type]


def test_run(recipe: Write, tmp_path: Path) -> None:
    result = quark_core.run(recipe(), folder=tmp_path / "run", overrides=["quantizer.weight=mxfp8"])
    assert result.metrics["quantized"]["sqnr"] > 20
    with pytest.raises(AccuracyGateError):
        quark_core.run(recipe({"evaluate.require": {"sqnr": "> 400"}}), folder=tmp_path / "strict")
