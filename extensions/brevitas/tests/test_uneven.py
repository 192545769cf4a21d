"""Texts of different lengths, and experts that see some tokens only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

LEARNED = {"name": "learned_round", "iterations": 300, "learning_rate": 0.01}
BLOCKS = {**LEARNED, "blocks": "model.layers"}
ALGORITHMS: list[Any] = ["gptq", "gpfq", "qronos", LEARNED]


def _quantizer(**fields: Any) -> BrevitasQuantizer:
    return BrevitasQuantizer(BrevitasConfig(**{"name": "brevitas", "weight": "int3", **fields}))


def _error(model: nn.Module, quantized: Any, data: list[dict[str, Tensor]]) -> float:
    wrong = size = 0.0
    with torch.no_grad():
        for batch in data:
            wanted = model(**batch).logits
            wrong += float((quantized(**batch).logits - wanted).square().sum())
            size += float(wanted.square().sum())
    return wrong / size


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    """A Llama of two blocks that keeps keys and values of earlier calls, as most do."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture
def texts() -> list[dict[str, Tensor]]:
    """Batches of unequal numbers of texts of unequal lengths."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((2, 9), (1, 23), (3, 15), (4, 9))
    return [{"input_ids": torch.randint(0, 64, size, generator=generator)} for size in sizes]


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, BLOCKS])
def test_texts_may_differ_in_length(
    llama: nn.Module, texts: list[dict[str, Tensor]], algorithm: Any
) -> None:
    rules = [{"glob": "*lm_head", "skip": True}]
    nearest = _quantizer(rules=rules).quantize(llama, texts)
    chosen = _quantizer(rules=rules, algorithm=algorithm).quantize(llama, texts)
    assert _error(llama, chosen, texts) < 0.9 * _error(llama, nearest, texts)
    assert llama.get_submodule("model").config.use_cache is True


class Experts(nn.Module):
    """Each token goes to one of four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(8, 8), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.last = nn.Linear(8, 4)

    def choose(self, x: Tensor) -> Tensor:
        """Which expert each token is for."""
        return self.router(x).argmax(-1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.first(tokens)
        chosen, mixed = self.choose(x), torch.zeros_like(x)
        for at, expert in enumerate(self.experts):
            mine = chosen == at
            if bool(mine.any()):
                mixed[mine] = expert(x[mine])
        out: Tensor = self.last(x + mixed)
        return out


@pytest.fixture
def experts() -> tuple[nn.Module, list[Tensor]]:
    """A model, and batches none of which is for the last expert, and the third for one alone."""
    torch.manual_seed(2)
    model = Experts().eval()
    tokens = torch.randn(4000, 8)
    with torch.no_grad():
        chosen = model.choose(model.first(tokens))
    pools = [tokens[chosen == at] for at in range(3)]
    assert all(len(pool) > 100 for pool in pools)
    first = torch.cat([pool[:40] for pool in pools])
    second = torch.cat([pool[40:80] for pool in pools[:2]])
    return model, [first, second, pools[1][80:100]]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_experts_are_rounded_on_the_tokens_they_get(
    experts: tuple[nn.Module, list[Tensor]], algorithm: Any
) -> None:
    model, data = experts
    # An exact router sends tokens where the float one does.
    rules = [{"name": name, "skip": True} for name in ("first", "router")]
    quantized = _quantizer(rules=rules, algorithm=algorithm).quantize(model, data)
    assert quantized.notes == [
        "1 layer(s) keep nearest codes, as the first batch called none of them: experts.3"
    ]
    for at in range(4):
        layer: Any = quantized.layer(f"experts.{at}")
        original = model.get_submodule(f"experts.{at}").get_parameter("weight")
        assert torch.equal(layer.weight, original) == (at == 3)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tokens_may_go_elsewhere_in_the_float_model(
    experts: tuple[nn.Module, list[Tensor]], algorithm: Any
) -> None:
    model, data = experts
    quantized = _quantizer(weight="int2/tensor", algorithm=algorithm).quantize(model, data)
    moved = False
    with torch.no_grad():
        for tokens in data:
            there = model.choose(model.first(tokens))  # type: ignore[operator]
            router, first = quantized.layer("router"), quantized.layer("first")
            moved |= bool((router(first(tokens)).argmax(-1) != there).any())
            assert torch.isfinite(quantized(tokens)).all()
    assert moved
