"""Sums of products stay within a register, whatever the inputs are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quark_brevitas.algorithms.balls import l1_cut
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

from quark_core.errors import ConfigError, QuantizationError


def _network() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 24)
    ).eval()
    mixing = torch.randn(16, 64)
    return model, [(torch.randn(8, 16) @ mixing).reshape(8, 4, 4, 4) for _ in range(4)]


def _quantize(model: nn.Module, data: list[Tensor], **fields: Any) -> Any:
    fields = {"name": "brevitas", "weight": "int4", "input": "int8/percentile:99.9", **fields}
    return BrevitasQuantizer(BrevitasConfig(**fields)).quantize(model, data)


def _error(model: nn.Module, quantized: Any, data: list[Tensor]) -> float:
    with torch.no_grad():
        wanted, found = model(torch.cat(data)), quantized(torch.cat(data))
    return float((wanted - found).square().sum() / wanted.square().sum())


def _worst(quantized: Any, tile: int | None, low: int, high: int) -> int:
    """The largest magnitude any tile of any row can sum up to."""
    worst = 0
    for entry in quantized.plan.quantized:
        layer: Any = quantized.layer(entry.name)
        with torch.no_grad():
            numbers = layer.quant_weight()
        codes = (numbers.value / numbers.scale).round().flatten(1)
        for part in torch.split(codes, tile or codes.shape[1], dim=1):
            p, n = part.clamp(min=0).sum(1), part.clamp(max=0).sum(1)
            worst = max(worst, int((high * p + low * n).max()), int(-(low * p + high * n).min()))
    return worst


ALGORITHMS = [
    {"name": "gptq"},
    {"name": "gptq", "act_order": True, "quantized_inputs": True},
    {"name": "gpfq"},
    {"name": "gpfq", "act_order": True},
]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("bits", "tile"), [(16, None), (13, 16)])
@pytest.mark.parametrize(
    ("spec", "codes"), [("int8/percentile:99.9", (-128, 127)), ("uint8/asym", (0, 255))]
)
def test_no_input_overflows_the_register(
    algorithm: dict[str, Any], bits: int, tile: int | None, spec: str, codes: tuple[int, int]
) -> None:
    model, data = _network()
    limit = 2 ** (bits - 1) - 1
    register = {"bits": bits, "tile": tile}
    free = _quantize(model, data, input=spec, algorithm=algorithm)
    kept = _quantize(model, data, input=spec, algorithm={**algorithm, "accumulator": register})
    assert _worst(free, tile, *codes) > limit
    assert limit / 2 < _worst(kept, tile, *codes) <= limit
    assert _error(model, kept, data) < 0.6
    wide = {**algorithm, "accumulator": {"bits": 32, "tile": tile}}
    same = _quantize(model, data, input=spec, algorithm=wide)
    assert torch.equal(same(data[0]), free(data[0]))


@pytest.mark.parametrize("name", ["gptq", "gpfq"])
def test_fast_engine_keeps_the_register_as_well_as_brevitas(name: str) -> None:
    model, data = _network()
    register = {"bits": 16}
    errors = {}
    for engine in ("fast", "brevitas"):
        options = {"name": name, "engine": engine, "accumulator": register}
        if name == "gptq":
            options["quantized_inputs"] = True
        quantized = _quantize(model, data, algorithm=options)
        assert _worst(quantized, None, -128, 127) <= 2**15 - 1
        errors[engine] = _error(model, quantized, data)
    assert errors["fast"] < 1.1 * errors["brevitas"]


def test_groups_are_tiles() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(64, 16)).eval(), [torch.randn(32, 64)]
    register = {"bits": 13, "tile": 16}
    options = {"name": "gptq", "accumulator": register}
    quantized = _quantize(model, data, weight="int4/group:16", algorithm=options)
    assert _worst(quantized, 16, -128, 127) <= 2**12 - 1


def test_cut_leaves_the_sum_that_is_asked_for() -> None:
    torch.manual_seed(0)
    sizes = torch.rand(20, 50) ** 4 * 30
    cut = l1_cut(sizes, 5.0)
    torch.testing.assert_close((sizes - cut).clamp(min=0).sum(1), torch.full((20,), 5.0))
    assert torch.equal(l1_cut(sizes, 1e6), torch.zeros(20, 1))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input": None}, "write input: int8"),
        ({"input": "fp8_e4m3"}, "write input: int8"),
        ({"weight": "int4/asym"}, "write weight: int8/sym"),
        ({"weight": "fp8_e4m3"}, "write weight: int8/sym"),
        ({"weight": "int4/group:8"}, "tile: 8"),
        ({"backend": "fx"}, "write backend: layerwise"),
    ],
)
def test_what_is_no_sum_of_integers_is_refused(fields: dict[str, Any], words: str) -> None:
    options = {"name": "gptq", "accumulator": {"bits": 16}}
    given = {"name": "brevitas", "weight": "int8", "input": "int8", "algorithm": options, **fields}
    with pytest.raises(ConfigError, match=words):
        BrevitasConfig(**given)


def test_groups_of_convolutions_are_refused() -> None:
    model, data = _network()
    options = {"name": "gptq", "accumulator": {"bits": 16, "tile": 4}}
    with pytest.raises(QuantizationError, match="Write int4/channel in a rule"):
        _quantize(model, data, weight="int4/group:4", algorithm=options)
