"""Layers of three axes, and embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

from quark_core.batch import Batch


def _quantizer(**fields: Any) -> BrevitasQuantizer:
    return BrevitasQuantizer(BrevitasConfig(**{"name": "brevitas", "weight": "int8", **fields}))


def _sqnr(truth: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(truth.square().sum() / (truth - found).square().sum()))


@pytest.fixture
def volumes() -> nn.Module:
    """Convolutions over three axes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.ConvTranspose3d(8, 4, 2),
        nn.Conv3d(4, 4, 2, groups=2),
    ).eval()


@pytest.mark.parametrize(
    ("fields", "least"),
    [
        ({"input": "int8", "bias": "int32"}, 30),
        ({"input": "int8", "backend": "fx", "equalize_iterations": 5}, 30),
        ({"weight": "int4", "input": "int8", "algorithm": "gptq", "bias_correction": True}, 15),
        ({"weight": "int4", "input": "int8", "algorithm": "qronos"}, 15),
        ({"weight": "int4/group:2", "magr": {}}, 12),
        ({"weight": "mxfp8_e4m3", "input": "mxfp8_e4m3"}, 18),
    ],
)
def test_three_axes(volumes: nn.Module, fields: dict[str, Any], least: float) -> None:
    batches = [torch.randn(2, 2, 4, 5, 6) for _ in range(3)]
    quantized = _quantizer(**fields).quantize(volumes, batches)
    assert [entry.op for entry in quantized.plan.quantized] == [
        "conv3d",
        "conv_transpose3d",
        "conv3d",
    ]
    with torch.no_grad():
        assert least < _sqnr(volumes(batches[0]), quantized(batches[0])) < 60


def test_gptq_beats_nearest_over_three_axes(volumes: nn.Module) -> None:
    batches = [torch.randn(4, 2, 4, 5, 6) for _ in range(4)]
    found = {}
    for algorithm in (None, "gptq"):
        quantized = _quantizer(weight="int4", algorithm=algorithm).quantize(volumes, batches)
        with torch.no_grad():
            x = torch.cat(batches)
            found[algorithm] = _sqnr(volumes(x), quantized(x))
    assert found["gptq"] > found[None] + 0.5


def test_gptq_of_brevitas_leaves_no_second_weight(volumes: nn.Module) -> None:
    batches = [torch.randn(2, 2, 4, 5, 6)]
    sizes = {
        engine: _quantizer(weight="int4", algorithm={"name": "gptq", "engine": engine})
        .quantize(volumes, batches)
        .size_bytes()
        for engine in ("fast", "brevitas")
    }
    assert sizes["fast"] == sizes["brevitas"]


class Text(nn.Module):
    """Token and position embeddings, of which the first lends its weight to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 32, padding_idx=0)
        self.positions = nn.Embedding(16, 32)
        self.body = nn.Linear(32, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, positions: Tensor, kept: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(positions)
        out: Tensor = self.head(torch.relu(self.body(x * kept[..., None])))
        return out


@pytest.fixture
def text() -> nn.Module:
    """A model that is given integers only."""
    torch.manual_seed(0)
    return Text().eval()


@pytest.fixture
def sentences() -> list[Batch]:
    """Token ids, positions, and which of them count."""
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(
            (torch.randint(0, 50, (2, 7), generator=generator),),
            {"positions": torch.arange(7).expand(2, 7), "kept": torch.ones(2, 7, dtype=torch.bool)},
        )
        for _ in range(3)
    ]


EMBEDDINGS = [
    ("int8/channel", (50,), 40),
    ("int8/tensor", (), 35),
    ("int4/group:16/asym", (50, 2), 15),
    ("mxfp8_e4m3", (50, 1), 25),
]


@pytest.mark.parametrize(("spec", "scales", "least"), EMBEDDINGS)
def test_embeddings(
    text: nn.Module,
    sentences: list[Batch],
    tmp_path: Path,
    spec: str,
    scales: tuple[int, ...],
    least: float,
) -> None:
    quantizer = _quantizer(rules=[{"type": "Embedding", "weight": spec}])
    quantized = quantizer.quantize(text, sentences)
    encodings = {encoding.tensor: encoding for encoding in quantized.encodings()}
    found = encodings["tokens.weight"].scale
    assert found is not None
    assert found.shape == scales
    row: Any = quantized.module.get_submodule("tokens")
    original: Any = text.get_submodule("tokens")
    with torch.no_grad():
        ids = torch.arange(50)
        assert least < _sqnr(original(ids), row(ids))
        # The output layer has a weight of its own now.
        assert row.weight is not quantized.module.get_submodule("head").weight
        truth = sentences[0].run(quantized.module)
    quantized.save(tmp_path)
    loaded = quantizer.restore(text, tmp_path)
    with torch.no_grad():
        assert torch.equal(sentences[0].run(loaded.module), truth)


def test_embeddings_stay_float_until_a_rule_says_otherwise(
    text: nn.Module, sentences: list[Batch]
) -> None:
    plan = _quantizer().make_plan(text, sentences[0])
    assert plan["tokens"].weight is None
    assert plan["tokens"].reason == "float unless a rule for it gives a weight"
    assert not plan.warnings
    rules = [{"glob": "*", "weight": "int4/channel"}, {"name": "positions", "skip": True}]
    plan = _quantizer(rules=rules).make_plan(text, sentences[0])
    assert str(plan["tokens"].weight) == "int4/channel/sym"
    assert plan["positions"].weight is None
    text.get_submodule("tokens").max_norm = 1.0  # type: ignore[assignment]
    plan = _quantizer(rules=rules).make_plan(text, sentences[0])
    assert plan["tokens"].reason.startswith("stays float: max_norm")


def test_integers_are_not_quantized_along_a_graph(text: nn.Module, sentences: list[Batch]) -> None:
    rules = [{"type": "Embedding", "weight": "int8/channel"}]
    quantized = _quantizer(backend="fx", input="int8", rules=rules).quantize(text, sentences)
    names = {name for name, _ in quantized.module.named_children()}
    assert not names & {"ids_quant", "positions_quant", "kept_quant"}
    truth, found = sentences[0].run(text), sentences[0].run(quantized.module)
    assert 20 < _sqnr(truth, found) < 50


def test_an_algorithm_leaves_embeddings_alone(text: nn.Module, sentences: list[Batch]) -> None:
    rules = [{"type": "Embedding", "weight": "int4/channel"}]
    quantizer = _quantizer(weight="int4", rules=rules, algorithm="gptq")
    plan = quantizer.make_plan(text, sentences[0])
    assert "leaves transposed convolutions and embeddings" in " ".join(plan.warnings)
    nearest = _quantizer(weight="int4", rules=rules).quantize(text, sentences)
    quantized = quantizer.quantize(text, sentences)
    rows: list[Any] = [model.module.get_submodule("tokens") for model in (nearest, quantized)]
    heads: list[Any] = [model.module.get_submodule("head") for model in (nearest, quantized)]
    assert torch.equal(*(row.quant_weight().value for row in rows))
    assert not torch.equal(*(head.quant_weight().value for head in heads))
