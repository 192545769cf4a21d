"""Rotations and norms: the float model computes what it did, and quantizing it loses less."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from quark_brevitas import rotation
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

from quark_core.batch import Batch
from quark_core.errors import ConfigError, QuantizationError

transformers = pytest.importorskip("transformers")

FUSED = {"merge_layernorm": True, "rotation": {}}
MODES: list[dict[str, Any]] = [
    {"merge_layernorm": True},
    {"rotation": {"mode": "layerwise"}},
    FUSED,
    {**FUSED, "rotation": {"matrix": "orthogonal"}},
    {**FUSED, "rotation": {"sdpa_regions": True}},
    {**FUSED, "rotation": {"sdpa_regions": True, "online": True}},
    {**FUSED, "rotation": {"block_size": 16}},
    {"rotation": {"mode": "layerwise", "block_size": 16}},
    {**FUSED, "rotation": {"block_size": 16, "permute": "massdiff", "online": True}},
]


def _config(**fields: Any) -> BrevitasConfig:
    return BrevitasConfig(**{"name": "brevitas", "weight": "int4/channel", **fields})


@pytest.fixture
def llama() -> nn.Module:
    """A Llama of two blocks with shared heads, tied ends, and a few channels that stand out."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(4)
            if "embed" in name:
                parameter[:, :2].mul_(20)
    return model


@pytest.fixture
def tokens() -> list[dict[str, Tensor]]:
    """Batches for it."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (3, 12), generator=generator)} for _ in range(3)]


class PreNorm(nn.Module):
    """Attention and layers between LayerNorms, as an encoder has them; can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.o, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 20), nn.Linear(20, 16)
        self.act, self.head = nn.GELU(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm1(x)
        y = nn.functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        x = x + self.o(y)
        x = x + self.down(self.act(self.up(self.norm2(x))))
        out: Tensor = self.head(self.norm3(x))
        return out


@pytest.fixture
def encoder() -> nn.Module:
    """That model with norms that have weights and biases."""
    torch.manual_seed(0)
    model = PreNorm().eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model


def _change(model: nn.Module, other: nn.Module, batch: Batch) -> float:
    with torch.no_grad():
        one, two = batch.run(model), batch.run(other)
    one, two = getattr(one, "logits", one), getattr(two, "logits", two)
    return float((one - two).norm() / one.norm())


@pytest.mark.parametrize("fields", MODES)
def test_the_float_model_computes_what_it_did(
    llama: nn.Module, tokens: list[dict[str, Tensor]], fields: dict[str, Any]
) -> None:
    changed, batch = copy.deepcopy(llama), Batch((), tokens[0])
    layers = [name for name, module in llama.named_modules() if isinstance(module, nn.Linear)]
    notes = rotation.transform(changed, _config(**fields), batch, layers)
    assert _change(llama, changed, batch) < 1e-5
    assert "moved the float model's outputs by" in notes[0]
    assert (
        not torch.equal(
            changed.get_parameter("model.embed_tokens.weight"),
            llama.get_parameter("model.embed_tokens.weight"),
        )
        or "layerwise" in str(fields)
        or "rotation" not in fields
    )
    assert {type(module).__name__ for module in changed.modules()} >= {"LlamaRMSNorm"}


def test_residual_stream_is_rotated_as_brevitas_does(
    llama: nn.Module, tokens: list[dict[str, Tensor]]
) -> None:
    from brevitas.graph.hadamard import matmul_hadU

    changed = copy.deepcopy(llama)
    rotation.transform(changed, _config(**FUSED), Batch((), tokens[0]), [])
    before, after = llama.state_dict(), changed.state_dict()
    torch.testing.assert_close(
        after["model.embed_tokens.weight"], matmul_hadU(before["model.embed_tokens.weight"])
    )
    for at in range(2):
        block = f"model.layers.{at}"
        for norm, name in (
            ("input_layernorm", "self_attn.q_proj"),
            ("input_layernorm", "self_attn.v_proj"),
            ("post_attention_layernorm", "mlp.up_proj"),
        ):
            weight = before[f"{block}.{name}.weight"] * before[f"{block}.{norm}.weight"]
            torch.testing.assert_close(after[f"{block}.{name}.weight"], matmul_hadU(weight))
        down = matmul_hadU(before[f"{block}.mlp.down_proj.weight"].T).T
        torch.testing.assert_close(after[f"{block}.mlp.down_proj.weight"], down)


@pytest.mark.parametrize("mode", ["fused", "fx"])
def test_layer_norms_become_rms_norms(encoder: nn.Module, mode: str) -> None:
    fields = {"merge_layernorm": True, "layernorm_to_rmsnorm": True, "rotation": {"mode": mode}}
    quantizer = BrevitasQuantizer(_config(**fields))
    x = torch.randn(4, 7, 6)
    quantized = quantizer.quantize(encoder, [x])
    assert sum(isinstance(module, nn.RMSNorm) for module in quantized.module.modules()) == 3
    for entry in quantized.plan.quantized:
        quantized.set_enabled(entry.name, False)
    assert _change(encoder, quantized.module, Batch((x,))) < 1e-5


def test_traced_and_recorded_graphs_give_the_same_model(encoder: nn.Module) -> None:
    x = torch.randn(4, 7, 6)
    fields = {"merge_layernorm": True, "layernorm_to_rmsnorm": True}
    outputs = [
        BrevitasQuantizer(_config(**fields, rotation={"mode": mode})).quantize(encoder, [x])(x)
        for mode in ("fused", "fx")
    ]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("fields", MODES[1:])
def test_rotation_keeps_more_of_the_signal(
    llama: nn.Module, tokens: list[dict[str, Tensor]], fields: dict[str, Any]
) -> None:
    common = {
        "weight": "int8/channel",
        "input": "int4/token/dynamic/sym",
        "rules": [{"glob": "lm_head", "skip": True}],
    }
    plain = BrevitasQuantizer(_config(**common)).quantize(llama, tokens)
    rotated = BrevitasQuantizer(_config(**common, **fields)).quantize(llama, tokens)
    batch = Batch((), tokens[0])
    assert _change(llama, rotated.module, batch) < 0.8 * _change(llama, plain.module, batch)


@pytest.mark.parametrize(
    "fields",
    [
        *MODES,
        {**FUSED, "activation_equalization": {}, "input": "int8"},
        {"rotation": {"mode": "layerwise"}, "activation_equalization": {}, "algorithm": "gptq"},
        {**FUSED, "rotation": {"online": True}, "algorithm": "gptq", "magr": {"steps": 2}},
    ],
)
def test_rotated_models_come_back(
    llama: nn.Module, tokens: list[dict[str, Tensor]], tmp_path: Path, fields: dict[str, Any]
) -> None:
    quantizer = BrevitasQuantizer(_config(**fields))
    quantized = quantizer.quantize(llama, tokens)
    quantized.save(tmp_path)
    loaded = quantizer.restore(llama, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**tokens[0]).logits, quantized(**tokens[0]).logits)
    assert len(loaded.encodings()) == len(quantized.encodings())
    assert loaded.size_bytes() == quantized.size_bytes()


def test_plan_names_the_place(llama: nn.Module, tokens: list[dict[str, Tensor]]) -> None:
    plan = BrevitasQuantizer(_config(**FUSED, magr={"steps": 1})).make_plan(llama, tokens[0])
    assert [step.name for step in plan.steps] == [
        "merge layernorm",
        "rotation",
        "magr",
        "layerwise rewriting",
    ]
    assert {type(module).__name__ for module in llama.modules()} >= {"LlamaRMSNorm"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rotation": {}}, "write merge_layernorm: true too, or mode: layerwise"),
        ({"layernorm_to_rmsnorm": True}, "write merge_layernorm: true too"),
        ({"rotation": {"mode": "layerwise", "matrix": "orthogonal"}}, "write matrix: hadamard"),
        ({"rotation": {"mode": "layerwise", "sdpa_regions": True}}, "leave sdpa_regions out"),
        ({"rotation": {"mode": "layerwise"}, "backend": "fx"}, "write mode: fx without online"),
        ({"rotation": {"mode": "layerwise"}, "weight": None}, "give weight a spec"),
        ({"rotation": {"permute": "zigzag"}, "merge_layernorm": True}, "give block_size"),
        (
            {"rotation": {"mode": "layerwise", "permute": "zigzag", "block_size": 4}},
            "no layers before to permute",
        ),
        (
            {"rotation": {"matrix": "orthogonal", "block_size": 4}, "merge_layernorm": True},
            "write matrix: hadamard",
        ),
    ],
)
def test_refused_by_the_configuration(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _config(**fields)
    assert words in str(caught.value)


def test_refused_by_the_plan(encoder: nn.Module) -> None:
    quantizer = BrevitasQuantizer(_config(**FUSED))
    with pytest.raises(QuantizationError) as caught:
        quantizer.make_plan(encoder, torch.randn(2, 7, 6))
    assert "Write layernorm_to_rmsnorm: true, or rotation.mode: layerwise" in str(caught.value)


@pytest.mark.parametrize(("size", "near"), [(7, 8), (1000, 24)])
def test_blocks_that_divide_nothing_are_refused(
    llama: nn.Module, tokens: list[dict[str, Tensor]], size: int, near: int
) -> None:
    quantizer = BrevitasQuantizer(_config(**{**FUSED, "rotation": {"block_size": size}}))
    with pytest.raises(QuantizationError, match=f"blocks of {size} .*block_size: {near}"):
        quantizer.make_plan(llama, tokens[0])
