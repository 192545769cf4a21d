"""SVDQuant: what stays float, what is quantized, and that both together are the float layer."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

from quark_core.errors import ConfigError, QuantizationError

WIDTH, RANK = 64, 4


def _quantizer(**fields: Any) -> BrevitasQuantizer:
    given = {"weight": "int4/channel", "low_rank": {"rank": RANK}, **fields}
    return BrevitasQuantizer(BrevitasConfig(name="brevitas", **given))


@pytest.fixture
def model() -> nn.Module:
    """Linear layers with a few directions that are far larger than the rest."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2 * WIDTH)).eval()
    with torch.no_grad():
        for layer in (net[0], net[2]):
            large = torch.randn(layer.weight.shape[0], RANK) @ torch.randn(RANK, WIDTH)
            layer.weight.add_(large)
    return net


@pytest.fixture
def x() -> Tensor:
    return torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(1))


def _sqnr(truth: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(truth.square().sum() / (truth - found).square().sum()))


def test_four_bits_beside_a_branch_are_far_closer(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        truth = model(x)
        plain = _sqnr(truth, _quantizer(low_rank=None).quantize(model)(x))
        beside = _sqnr(truth, _quantizer().quantize(model)(x))
    assert beside > plain + 15


def test_the_branch_is_the_best_of_its_rank_and_the_rest_is_quantized(model: nn.Module) -> None:
    quantized = _quantizer().quantize(model)
    branch = quantized.module.get_submodule("0")
    weight = model[0].weight
    approximation = branch.up @ branch.down
    values = torch.linalg.svdvals(weight)
    # Eckart and Young: no matrix of this rank is nearer.
    assert torch.allclose((weight - approximation).norm(), values[RANK:].norm(), rtol=1e-4)
    assert torch.allclose(branch.layer.weight + approximation, weight, atol=1e-5)
    (encoding, _) = quantized.encodings()
    assert encoding.tensor == "0.weight"
    assert encoding.scale is not None
    assert encoding.scale.max() < 0.2 * weight.abs().max() / 7


def test_equal_to_one_iteration_of_brevitas(model: nn.Module, x: Tensor) -> None:
    from brevitas_examples.common.svd_quant import LayerwiseLowRankCorrection
    from quark_brevitas import preparation

    quantizer = _quantizer()
    plan = quantizer.plan(model)
    direct = preparation.replace_layers(copy.deepcopy(model), plan, quantizer.config)
    direct, _ = LayerwiseLowRankCorrection(direct).apply(rank=RANK, iters=1)
    with torch.no_grad():
        theirs, ours = direct(x), quantizer.quantize(model)(x)
    # Two decompositions differ in their last bits, and a code or two with them.
    assert _sqnr(theirs, ours) > 40


@pytest.fixture
def spread() -> nn.Module:
    """Linear layers without any direction that stands out."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 96)).eval()


def _weight_errors(float_model: Any, iterations: int) -> list[float]:
    quantized = _quantizer(low_rank={"rank": RANK, "iterations": iterations}).quantize(float_model)
    found = []
    for name in ("0", "2"):
        branch = quantized.module.get_submodule(name)
        whole = branch.layer.quant_weight().value + branch.up @ branch.down
        found.append(float((whole - float_model.get_submodule(name).weight).detach().norm()))
    return found


def test_error_never_grows_with_iterations(spread: nn.Module) -> None:
    errors = [_weight_errors(spread, iterations) for iterations in (1, 2, 3, 6, 12)]
    for before, after in itertools.pairwise(errors):
        assert all(b <= a * (1 + 1e-6) for a, b in zip(before, after, strict=True))
    assert all(last < 0.95 * first for first, last in zip(errors[0], errors[-1], strict=True))


def test_the_best_iteration_is_kept(spread: Any) -> None:
    from quark_brevitas import low_rank
    from quark_brevitas.options import LowRank

    weight = spread[0].weight.detach().clone()
    offsets, seen = iter((3.0, 1.0, 5.0, 2.0)), list[Tensor]()

    def rounded(name: str, rest: Tensor) -> Tensor:
        assert name == "first"
        seen.append(rest)
        return rest + next(offsets)

    options = LowRank(rank=RANK, iterations=4)
    low_rank.put_branches(spread, {"first": "0"}, options, rounded)
    assert torch.equal(spread[0].layer.weight, seen[1])
    assert torch.allclose(seen[1] + spread[0].up @ spread[0].down, weight, atol=1e-5)


def test_equal_to_several_iterations_of_brevitas(spread: nn.Module) -> None:
    from brevitas_examples.common.svd_quant import LayerwiseLowRankCorrection
    from quark_brevitas import preparation

    quantizer = _quantizer(low_rank={"rank": RANK, "iterations": 5})
    direct = preparation.replace_layers(
        copy.deepcopy(spread), quantizer.plan(spread), quantizer.config
    )
    with torch.no_grad():
        direct, errors = LayerwiseLowRankCorrection(direct).apply(rank=RANK, iters=5)
    weights = [spread.get_submodule(name).weight.norm().item() for name in ("0", "2")]
    ours = [
        error / weight for error, weight in zip(_weight_errors(spread, 5), weights, strict=True)
    ]
    assert ours == pytest.approx(errors.tolist(), rel=0.02)


def test_loading_takes_iterated_branches_from_the_file(
    spread: nn.Module, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quark_brevitas import low_rank

    quantizer = _quantizer(low_rank={"rank": RANK, "iterations": 6})
    quantized = quantizer.quantize(spread)
    quantized.save(tmp_path)
    monkeypatch.setattr(low_rank, "_refined", None)
    loaded = quantizer.restore(spread, tmp_path)
    assert torch.equal(loaded(x), quantized(x))
    once = _quantizer().quantize(spread)
    assert not torch.equal(once(x), quantized(x))


def test_switched_off_it_is_the_float_model(model: nn.Module, x: Tensor) -> None:
    quantized = _quantizer(input="int8").quantize(model, [x])
    for name in ("0", "2"):
        quantized.set_enabled(name, enabled=False)
    assert torch.allclose(quantized(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"input": "int8"},
        {"activation_equalization": {"mode": "layerwise", "alpha": 0.5}, "input": "int8"},
        {"algorithm": "gptq"},
    ],
)
def test_loaded_models_compute_the_same(
    model: nn.Module, x: Tensor, more: dict[str, Any], tmp_path: Path
) -> None:
    quantizer = _quantizer(**more)
    quantized = quantizer.quantize(model, [x])
    quantized.save(tmp_path)
    loaded = quantizer.restore(model, tmp_path)
    assert torch.equal(loaded(x), quantized(x))
    assert loaded.storage() == quantized.storage()


@pytest.mark.parametrize(
    ("more", "added"),
    [
        ({}, RANK * (2 * WIDTH + 3 * WIDTH) * 4),
        ({"activation_equalization": {"mode": "layerwise"}, "low_rank": None}, 2 * WIDTH * 4),
        ({"rotation": {"mode": "layerwise"}, "low_rank": None}, 0),
    ],
)
def test_what_stands_around_a_layer_is_added_to_its_packed_size(
    model: nn.Module, x: Tensor, more: dict[str, Any], added: int
) -> None:
    plain = _quantizer(low_rank=None, input="int8").quantize(model, [x])
    found = _quantizer(input="int8", **more).quantize(model, [x])
    assert found.size_bytes() == plain.size_bytes() + added


def test_the_plan_tells_and_refuses(model: nn.Module) -> None:
    steps = [step.name for step in _quantizer().plan(model).steps]
    assert steps.index("low rank") < steps.index("layerwise rewriting")
    with pytest.raises(QuantizationError, match=r"rank 64 leaves nothing.*low_rank.rank: 8"):
        _quantizer(low_rank={"rank": WIDTH}).plan(model)
    with pytest.raises(QuantizationError, match="none is quantized"):
        _quantizer().plan(nn.Sequential(nn.Conv2d(3, 8, 3)))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"weight": None}, "no weight is quantized"),
        ({"backend": "fx"}, "backend: layerwise"),
        ({"bias_correction": True}, "bias_correction: false"),
    ],
)
def test_refused_before_any_model(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        _quantizer(**fields)
