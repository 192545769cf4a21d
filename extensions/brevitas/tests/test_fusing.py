"""Factors folded into norms and layers: same float model, nothing at run time, no worse quantized."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from quark_brevitas import fusing
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

from quark_core.batch import Batch
from quark_core.errors import ConfigError, DataError, QuantizationError

transformers = pytest.importorskip("transformers")

SMOOTH: dict[str, Any] = {
    "weight": "int8",
    "input": "int8/tensor/sym",
    "activation_equalization": {"mode": "fused"},
}
AWQ: dict[str, Any] = {"weight": "int4/group:8/asym", "awq": {"mode": "fused", "steps": 8}}
HEAD = {"rules": [{"name": "lm_head", "skip": True}]}


def _quantizer(fields: dict[str, Any]) -> BrevitasQuantizer:
    return BrevitasQuantizer(BrevitasConfig(name="brevitas", **fields))


def _layerwise(fields: dict[str, Any]) -> dict[str, Any]:
    """The same with factors before layers."""
    names = ("activation_equalization", "awq")
    return {
        key: {**value, "mode": "layerwise"} if key in names else value
        for key, value in fields.items()
    }


@pytest.fixture(params=["sdpa", "eager"])
def llama(request: pytest.FixtureRequest) -> nn.Module:
    """A Llama of two blocks with shared heads, tied ends, and channels that stand out."""
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
        attn_implementation=request.param,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
                parameter[::7] *= 12
            else:
                parameter.mul_(4)
    return model


@pytest.fixture
def tokens() -> list[dict[str, Tensor]]:
    """Batches for it."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (3, 12), generator=generator)} for _ in range(3)]


def _layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _wrapped(model: nn.Module) -> list[str]:
    found = model.named_modules()
    return [name for name, module in found if type(module).__name__ == "EqualizedModule"]


def _change(model: nn.Module, other: Any, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        one, two = model(**batch).logits, other(**batch).logits
    return float((one - two).norm() / one.norm())


def _moving(sinks: dict[str, Tensor] | Any) -> dict[str, list[int]]:
    return {name: channels.tolist() for name, channels in sinks.items()}


def test_regions_of_a_llama(llama: nn.Module, tokens: list[dict[str, Tensor]]) -> None:
    found = fusing.regions(llama, Batch((), tokens[0]), _layers(llama))
    hidden, wide = list(range(32)), list(range(48))
    # Two heads of eight channels each write what four heads read.
    shared = [*range(8), *range(8), *range(8, 16), *range(8, 16)]
    expected: list[tuple[str, dict[str, list[int]]]] = []
    for at in range(2):
        block = f"model.layers.{at}"
        first = {f"{block}.self_attn.{name}_proj": hidden for name in "qkv"}
        expected += [
            (f"{block}.input_layernorm", first),
            (f"{block}.self_attn.v_proj", {f"{block}.self_attn.o_proj": shared}),
            (
                f"{block}.post_attention_layernorm",
                {f"{block}.mlp.{name}_proj": hidden for name in ("gate", "up")},
            ),
            (f"{block}.mlp.up_proj", {f"{block}.mlp.down_proj": wide}),
        ]
    expected.append(("model.norm", {"lm_head": hidden}))
    assert [(one.source, _moving(one.sinks)) for one in found] == expected
    only = fusing.regions(llama, Batch((), tokens[0]), ["model.layers.1.mlp.up_proj"])
    assert [one.source for one in only] == ["model.layers.1.post_attention_layernorm"]


class Odd(nn.Module):
    """Paths along which factors would be lost, and one along which they are not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.e, self.f, self.g, self.h = (nn.Linear(6, 6) for _ in range(4))
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = self.b(y * y.sigmoid())  # a: a sigmoid reads it too
        y = self.c(y + x)  # b: a sum with something else
        y = self.d(torch.relu(y) * 2)  # c: fine
        z = self.e(self.norm(y))  # the norm: fine; d: a norm reads it
        z = self.f(z.transpose(-1, -2))  # e: each column reads all channels
        y = self.g(z.flip(-1))  # f: an operation that is not known
        out: Tensor = self.h(y) + y  # g: the output reads it too
        return out


def test_paths_that_lose_factors_are_no_regions() -> None:
    found = fusing.regions(Odd().eval(), Batch((torch.randn(2, 6, 6),)), "abcdefgh")
    pairs = [(one.source, list(one.sinks)) for one in found]
    assert pairs == [("c", ["d"]), ("norm", ["e"])]


class Squares(nn.Module):
    """Products in which factors would count twice, and attention without positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = self.b(y * y)
        y = self.c(y.relu() * (y * 2))
        y = y.sin()
        y = nn.functional.scaled_dot_product_attention(self.q(y), self.k(y), value=self.v(y))
        out: Tensor = self.o(y)
        return out


def test_what_is_not_proportional_is_no_region() -> None:
    found = fusing.regions(Squares().eval(), Batch((torch.randn(2, 6, 6),)), "abcqkvo")
    assert [(one.source, list(one.sinks)) for one in found] == [("v", ["o"])]


class Tied(nn.Module):
    """An output layer that shares the embedding's weight, and another layer after the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(16, 8), nn.LayerNorm(8)
        self.head, self.other = nn.Linear(8, 16, bias=False), nn.Linear(8, 4)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.embed(x))
        return torch.cat([self.head(y), self.other(y)], -1)


def test_float_layers_of_a_region_are_multiplied_too_and_get_weights_of_their_own(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.arange(16).reshape(4, 4)
    quantizer = _quantizer({**SMOOTH, "rules": [{"name": "head", "skip": True}]})
    quantized = quantizer.quantize(model, [x])
    after = quantized.module
    assert torch.equal(after.embed.weight, model.embed.weight)
    assert not torch.allclose(after.head.weight, model.head.weight)
    torch.testing.assert_close(quantized(x)[..., :16], model(x)[..., :16])
    quantized.save(tmp_path)
    assert torch.equal(quantizer.restore(model, tmp_path)(x), quantized(x))


@pytest.mark.parametrize("fields", [SMOOTH, AWQ])
def test_float_outputs_stay_and_nothing_is_left_at_run_time(
    llama: nn.Module, tokens: list[dict[str, Tensor]], fields: dict[str, Any]
) -> None:
    before = copy.deepcopy(llama.state_dict())
    quantized = _quantizer(fields).quantize(llama, tokens)
    assert not _wrapped(quantized.module)
    assert len(_wrapped(_quantizer(_layerwise(fields)).quantize(llama, tokens).module)) >= 10
    after = quantized.module.state_dict()
    for name in ("input_layernorm", "mlp.down_proj", "self_attn.o_proj"):
        key = f"model.layers.1.{name}.weight"
        assert not torch.allclose(after[key], before[key])
    # The embedding is not what the output layer's columns were multiplied in.
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    said = [note for note in quantized.notes if "folding factors moved" in note]
    assert len(said) == 1
    assert any("factors of 15 of 15 Linear layers are folded" in one for one in quantized.notes)
    for entry in quantized.plan.quantized:
        quantized.set_enabled(entry.name, False)
    assert 0 < _change(llama, quantized, tokens[0]) < 1e-5


@pytest.mark.parametrize("fields", [SMOOTH, AWQ])
def test_quantized_it_is_no_worse_than_with_factors_before_layers(
    llama: nn.Module, tokens: list[dict[str, Tensor]], fields: dict[str, Any]
) -> None:
    given = {**fields, **HEAD}
    plain = {
        key: one for key, one in given.items() if key not in ("activation_equalization", "awq")
    }
    fused, layerwise, nearest = (
        _change(llama, _quantizer(one).quantize(llama, tokens), tokens[0])
        for one in (given, _layerwise(given), plain)
    )
    assert fused < 1.1 * layerwise
    assert fused < 0.8 * nearest


def test_the_factor_is_smoothquants(tokens: list[dict[str, Tensor]]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    nn.init.uniform_(model[0].weight, 0.1, 9)
    nn.init.normal_(model[0].bias)
    batches = [torch.randn(8, 6) for _ in range(3)]
    fields = {**SMOOTH, "activation_equalization": {"mode": "fused", "alpha": 0.3}}
    quantized = _quantizer(fields).quantize(model, batches)
    with torch.no_grad():
        largest = torch.cat([model[0](x) for x in batches]).abs().amax(0)
        factor = largest**0.3 / model[1].weight.abs().amax(0) ** 0.7
        found = quantized.module
        torch.testing.assert_close(found[0].weight, model[0].weight / factor)
        torch.testing.assert_close(found[0].bias, model[0].bias / factor)
        hidden = torch.cat([model[:3](x) for x in batches]).abs().amax(0)
        then = hidden**0.3 / model[3].weight.abs().amax(0) ** 0.7
        torch.testing.assert_close(found[1].weight, model[1].weight * factor / then[:, None])
        torch.testing.assert_close(found[1].bias, model[1].bias / then)
        torch.testing.assert_close(found[3].weight, model[3].weight * then)


@pytest.mark.parametrize(
    "fields",
    [
        SMOOTH,
        AWQ,
        {**SMOOTH, **HEAD, "algorithm": "gptq"},
        {**SMOOTH, "merge_layernorm": True, "rotation": {}},
        {**AWQ, "low_rank": {"rank": 2}, "attention": {}},
        {**AWQ, "merge_layernorm": True, "rotation": {"online": True}},
    ],
)
def test_they_come_back(
    llama: nn.Module, tokens: list[dict[str, Tensor]], tmp_path: Path, fields: dict[str, Any]
) -> None:
    if "attention" in fields and llama.config._attn_implementation == "eager":
        pytest.skip("calls no attention function")
    quantizer = _quantizer(fields)
    quantized = quantizer.quantize(llama, tokens)
    quantized.save(tmp_path)
    loaded = quantizer.restore(llama, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**tokens[0]).logits, quantized(**tokens[0]).logits)
    assert len(loaded.encodings()) == len(quantized.encodings())
    assert loaded.size_bytes() == quantized.size_bytes()
    for entry in quantized.plan.quantized:
        assert loaded.counterpart(entry.name) == quantized.counterpart(entry.name)


def test_sizes_and_counterparts(llama: nn.Module, tokens: list[dict[str, Tensor]]) -> None:
    given = {**SMOOTH, **HEAD}
    plain = {key: one for key, one in given.items() if key != "activation_equalization"}
    fused = _quantizer(given).quantize(llama, tokens)
    assert fused.size_bytes() == _quantizer(plain).quantize(llama, tokens).size_bytes()
    assert {fused.counterpart(entry.name) for entry in fused.plan.quantized} == {None}
    assert fused.counterpart("lm_head") == "lm_head"


def test_layers_outside_of_regions(tokens: list[dict[str, Tensor]]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 8)).eval()
    sizes = torch.ones(8)
    sizes[::3] = 20
    nn.init.uniform_(model[2].weight, 0.2, 9)
    x = [torch.randn(64, 8) * sizes]
    smooth = _quantizer(SMOOTH).quantize(model, x)
    assert not _wrapped(smooth.module)
    assert torch.equal(smooth.module[0].weight, model[0].weight)
    assert any(note.endswith("1 are not equalized: 0") for note in smooth.notes)
    awq = _quantizer(AWQ).quantize(model, x)
    assert _wrapped(awq.module) == ["0"]
    assert any(note.endswith("1 are divided for at run time: 0") for note in awq.notes)
    for entry in awq.plan.quantized:
        awq.set_enabled(entry.name, False)
    torch.testing.assert_close(awq(x[0]), model(x[0]), rtol=1e-4, atol=1e-4)


def test_an_interrupted_run_has_the_same_factors(
    llama: nn.Module, tokens: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    quantizer = _quantizer({**SMOOTH, "input": None})
    first = quantizer.quantize(llama, tokens, partial=tmp_path)
    other = [{"input_ids": (batch["input_ids"] + 1) % 64} for batch in tokens]
    again = quantizer.quantize(llama, other, partial=tmp_path)
    fresh = quantizer.quantize(llama, other)
    key = "model.layers.1.mlp.down_proj.weight"
    weights = [one.module.get_parameter(key) for one in (first, again, fresh)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_layer_may_have_a_factor_before_it_and_take_over_another(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    with torch.no_grad():
        model[0].weight[::5] *= 15
    x = [torch.randn(64, 16) * torch.linspace(0.1, 9, 16)]
    first = _quantizer(AWQ).quantize(model, x, partial=tmp_path)
    assert _wrapped(first.module) == ["0"]
    again = _quantizer(AWQ).quantize(model, [-x[0]], partial=tmp_path)
    assert torch.equal(first(x[0]), again(x[0]))
    assert not torch.allclose(first.module.get_parameter("2.weight"), model[2].weight)


def test_a_cache_goes_on_working(llama: nn.Module, tokens: list[dict[str, Tensor]]) -> None:
    quantized = _quantizer(AWQ).quantize(llama, tokens)
    given: Any = quantized.module
    prompt = tokens[0]["input_ids"]
    long = given.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    slow = given.generate(
        prompt, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False
    )
    assert torch.equal(long, slow)


@pytest.mark.parametrize("fields", [SMOOTH, AWQ])
def test_the_plan_says_where_factors_go(fields: dict[str, Any]) -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    fused, layerwise = (
        _quantizer(one).make_plan(model, torch.randn(2, 8)).steps[0]
        for one in (fields, _layerwise(fields))
    )
    assert fused.name == layerwise.name
    assert "norms and layers before take over the factors" in fused.reason
    assert "take over" not in layerwise.reason


@pytest.mark.parametrize("fields", [SMOOTH, AWQ])
def test_refusals(fields: dict[str, Any]) -> None:
    quantizer, model = _quantizer(fields), nn.Sequential(nn.Linear(8, 8), nn.GELU())
    where = "activation_equalization.mode" if "awq" not in fields else "awq.mode"
    with pytest.raises(QuantizationError, match=f"{where}: layerwise"):
        quantizer.make_plan(model, torch.randn(2, 8))
    with pytest.raises((DataError, QuantizationError), match="calibration"):
        quantizer.quantize(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), None)


@pytest.mark.parametrize("fields", [SMOOTH, AWQ])
def test_refused_behind_rotations_at_run_time(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"write .*mode: layerwise, or rotation.mode: fused"):
        _quantizer({**fields, "rotation": {"mode": "layerwise"}})


def test_passes_before_rewriting_see_the_float_model(
    llama: nn.Module, tokens: list[dict[str, Tensor]]
) -> None:
    seen: list[set[str]] = []
    quantizer = _quantizer({**SMOOTH, "merge_layernorm": True, "rotation": {}})
    plan = quantizer.make_plan(llama, tokens[0])
    prepared = quantizer.prepare(copy.deepcopy(llama), plan, Batch((), tokens[0]))
    with torch.no_grad():
        for _ in quantizer.passes(prepared, plan):
            seen.append({type(module).__name__ for module in prepared.module.modules()})
            for batch in tokens:
                quantizer.calibrate(prepared, Batch((), batch))
    assert ["QuantLinear" in names for names in seen] == [False, True]


def test_with_fx(tokens: list[dict[str, Tensor]]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = [torch.randn(16, 8)]
    quantized = _quantizer({**SMOOTH, "backend": "fx"}).quantize(model, x)
    assert not torch.allclose(quantized.module.get_parameter("0.weight"), model[0].weight)
    torch.testing.assert_close(quantized(x[0]), model(x[0]), atol=0.1, rtol=0.1)
