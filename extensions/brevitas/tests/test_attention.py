"""Quantized attention: the same numbers as Brevitas's own module, on any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

from quark_core.errors import ConfigError, QuantizationError


class Block(nn.Module):
    """Self-attention with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        q = parts[0].unflatten(-1, (2, 4)).transpose(1, 2)
        k = parts[1].unflatten(-1, (2, 4)).transpose(1, 2)
        v = parts[2].unflatten(-1, (2, 4)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(-2))
        return out


@pytest.fixture
def model() -> nn.Module:
    """Two blocks; attention alone is quantized when layers are skipped."""
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.ReLU(), Block()).eval()


@pytest.fixture
def batches() -> list[Tensor]:
    """Inputs for them."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5, 8, generator=generator) for _ in range(3)]


def _quantizer(**fields: Any) -> BrevitasQuantizer:
    return BrevitasQuantizer(BrevitasConfig(**{"name": "brevitas", "weight": "int8", **fields}))


def _direct(model: Any, batches: list[Tensor], spec: str, tensors: str) -> list[Tensor]:
    """The first block with Brevitas's module called by hand, its weights as they are."""
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.nn import QuantScaledDotProductAttention
    from brevitas.quant.float_quant_ocp import FpOCPActPerTensorFloat
    from brevitas.quant.scaled_int import Int8ActPerTensorFloat

    if spec.startswith("fp8"):
        quant = FpOCPActPerTensorFloat.let(bit_width=8, exponent_bit_width=4, mantissa_bit_width=3)
        softmax = quant
    else:
        quant = Int8ActPerTensorFloat.let(high_percentile_q=100.0)
        softmax = quant.let(signed=False)
    attend = QuantScaledDotProductAttention(
        q_scaled_quant=quant if "q" in tensors else None,
        k_transposed_quant=quant,
        v_quant=quant,
        attn_output_weights_quant=softmax if "s" in tensors else None,
    ).eval()

    def run(x: Tensor) -> Tensor:
        parts = model.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in parts)
        out: Tensor = model.out(attend(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return out

    with torch.no_grad():
        with calibration_mode(attend):
            for batch in batches:
                run(batch)
        return [run(batch) for batch in batches]


@pytest.mark.parametrize("tensors", ["qkvs", "qkv", "kv"])
@pytest.mark.parametrize("spec", ["int8/sym", "fp8_e4m3"])
def test_numbers_are_those_of_brevitas(
    model: Any, batches: list[Tensor], spec: str, tensors: str
) -> None:
    block = model[0]
    rules = [{"type": "Linear", "skip": True}]
    quantizer = _quantizer(attention={"spec": spec, "tensors": tensors}, rules=rules)
    quantized = quantizer.quantize(block, batches)
    expected = _direct(block, batches, spec, tensors)
    with torch.no_grad():
        for batch, wanted in zip(batches, expected, strict=True):
            assert torch.equal(quantized(batch), wanted)
            assert not torch.equal(quantized(batch), block(batch))


SPECS = [
    "int8/asym",
    "int4/power_of_two/sym",
    "int8/tensor/dynamic/sym",
    "int8/tensor/dynamic/asym",
    "int8/token/dynamic/sym",
    "int8/token/dynamic/asym",
    "fp8_e4m3/tensor/dynamic",
    "fp8_e4m3/token/dynamic",
    "fp8_e5m2",
    "fp6_e3m2/power_of_two",
]


@pytest.mark.parametrize("spec", SPECS)
def test_other_specs_in_brevitas_module(model: Any, batches: list[Tensor], spec: str) -> None:
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.nn import QuantScaledDotProductAttention
    from quark_brevitas import attention

    quantizer = _quantizer(attention={"spec": spec}, rules=[{"type": "Linear", "skip": True}])
    quantized = quantizer.quantize(model[0], batches)
    options = quantizer.config.attention
    assert options is not None
    resolved = options.spec.resolve("input")
    attend = QuantScaledDotProductAttention(**attention.settings(options, resolved)).eval()

    def run(x: Tensor) -> Tensor:
        parts = model[0].qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in parts)
        y = attend(q, k, v, is_causal=True)
        out: Tensor = model[0].out(y.transpose(1, 2).flatten(-2))
        return out

    with torch.no_grad():
        with calibration_mode(attend):
            for batch in batches:
                run(batch)
        for batch in batches:
            assert torch.equal(quantized(batch), run(batch))
            assert not torch.equal(quantized(batch), model[0](batch))
    found = [one for one in quantized.encodings() if one.layer == "sdpa"]
    assert [one.tensor for one in found] == [
        f"sdpa.{n}" for n in ("input", "key", "value", "softmax")
    ]
    unsigned = resolved.symmetric and resolved.number_format.family == "integer"
    assert found[3].format == f"{'u' if unsigned else ''}{resolved.format}"
    assert {one.granularity for one in found} == {str(resolved.granularity)}
    assert {one.dynamic for one in found} == {resolved.dynamic}
    for one in found:
        assert (one.scale is None) == resolved.dynamic


def test_tokens_are_rows_of_queries_keys_values_and_softmax(
    model: Any, batches: list[Tensor]
) -> None:
    fields = {"attention": {"spec": "int8/token/dynamic/sym"}}
    rules = [{"type": "Linear", "skip": True}]
    quantized = _quantizer(**fields, rules=rules).quantize(model[0], batches)

    def rounded(x: Tensor, levels: int) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / levels
        low = -levels if levels == 128 else 0
        return (x / scale).round().clamp(low, levels - (levels == 128)) * scale

    with torch.no_grad():
        parts = model[0].qkv(batches[0]).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in parts)
        shares = rounded(q / 2, 128) @ rounded(k, 128).transpose(-1, -2)
        shares = shares.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf")).softmax(-1)
        y = rounded(shares, 255) @ rounded(v, 128)
        expected = model[0].out(y.transpose(1, 2).flatten(-2))
        torch.testing.assert_close(quantized(batches[0]), expected, atol=1e-6, rtol=1e-5)


class Heads(nn.Module):
    """Attention between layers of its own, which fx can see through."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(-1, 5, 2, 4).transpose(1, 2)
        k = self.k(x).view(-1, 5, 2, 4).transpose(1, 2)
        v = self.v(x).view(-1, 5, 2, 4).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.o(y.transpose(1, 2).reshape(-1, 5, 8))
        return out


@pytest.mark.parametrize("spec", ["int8/sym", "int8/token/dynamic/sym", "fp8_e4m3"])
def test_with_fx(batches: list[Tensor], tmp_path: Path, spec: str) -> None:
    from brevitas.nn import QuantScaledDotProductAttention
    from brevitas.quant_tensor import QuantTensor

    torch.manual_seed(0)
    model = Heads().eval()
    quantizer = _quantizer(backend="fx", input="int8/sym", attention={"spec": spec})
    quantized = quantizer.quantize(model, batches[:1])
    (site,) = [entry.name for entry in quantized.plan.quantized if entry.op == "attention"]
    module = quantized.module.get_submodule(site)
    seen: list[Any] = []
    module.register_forward_hook(lambda _module, args, output: seen.append((args, output)))
    with torch.no_grad():
        result = quantized(batches[0])
        torch.testing.assert_close(result, model(batches[0]), atol=0.05, rtol=0.1)
        ((args, output),) = seen
        # Layers hand over what fx quantized; attention's own quantizers take the values.
        assert any(isinstance(one, QuantTensor) for one in args)
        values = [one.value if isinstance(one, QuantTensor) else one for one in args]
        assert torch.equal(output, QuantScaledDotProductAttention.forward(module, *values))
        assert not torch.equal(output, nn.functional.scaled_dot_product_attention(*values))
    names = [one.tensor for one in quantized.encodings() if one.layer == site]
    assert names == [f"{site}.{part}" for part in ("input", "key", "value", "softmax")]
    quantized.save(tmp_path)
    loaded = quantizer.restore(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]), result)
        quantized.set_enabled(site, False)
        seen.clear()
        quantized(batches[0])
        ((args, output),) = seen
        values = [one.value if isinstance(one, QuantTensor) else one for one in args]
        wanted = nn.functional.scaled_dot_product_attention(*values)
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spec", ["int8/sym", "int8/token/dynamic/sym", "fp8_e4m3"])
def test_generating_with_a_cache(spec: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = [{"input_ids": torch.randint(0, 64, (2, 10))} for _ in range(2)]
    fields = {"rules": [{"type": "Linear", "skip": True}], "attention": {"spec": spec}}
    module: Any = _quantizer(**fields).quantize(model, tokens).module
    prompt = tokens[0]["input_ids"]
    made = module.generate(
        prompt,
        max_new_tokens=6,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert made.past_key_values.get_seq_length() == 15
    with torch.no_grad():
        whole = module(input_ids=made.sequences, use_cache=False).logits
        plain = model(input_ids=made.sequences).logits
    assert not torch.equal(whole, plain)
    for at, logits in enumerate(made.logits):
        torch.testing.assert_close(logits, whole[:, 9 + at], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["functional", "fx"])
def test_each_call_has_scales_of_its_own(
    model: nn.Module, batches: list[Tensor], tmp_path: Path, mode: str
) -> None:
    quantizer = _quantizer(attention={"mode": mode}, input="int8")
    quantized = quantizer.quantize(model, batches)
    sites = [entry.name for entry in quantized.plan.quantized if entry.op == "attention"]
    assert len(sites) == 2
    if mode == "functional":
        assert sites == ["0.sdpa", "2.sdpa"]
    scales = {one.tensor: one.scale for one in quantized.encodings() if one.layer in sites}
    parts = ("input", "key", "value", "softmax")
    assert list(scales) == [f"{site}.{part}" for site in sites for part in parts]
    assert len({float(scale) for scale in scales.values() if scale is not None}) >= 7
    formats = {one.tensor: one.format for one in quantized.encodings()}
    assert formats[f"{sites[0]}.softmax"] == "uint8"
    quantized.save(tmp_path)
    loaded = quantizer.restore(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]), quantized(batches[0]))
        for entry in quantized.plan.quantized:
            quantized.set_enabled(entry.name, False)
        torch.testing.assert_close(quantized(batches[0]), model(batches[0]))


def test_modes_agree(model: nn.Module, batches: list[Tensor]) -> None:
    outputs = [
        _quantizer(attention={"mode": mode}).quantize(model, batches)(batches[0])
        for mode in ("functional", "fx")
    ]
    assert torch.equal(*outputs)


def test_a_rule_leaves_a_call_float(model: nn.Module, batches: list[Tensor]) -> None:
    quantizer = _quantizer(attention={}, rules=[{"name": "2.sdpa", "skip": True}])
    plan = quantizer.quantize(model, batches).plan
    assert [entry.name for entry in plan.quantized if entry.op == "attention"] == ["0.sdpa"]


def test_transformers_models() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = [{"input_ids": torch.arange(12).reshape(2, 6) % 32}]
    fields = {"merge_layernorm": True, "rotation": {"sdpa_regions": True}, "algorithm": "gptq"}
    for more in ({}, fields):
        quantized = _quantizer(attention={}, **more).quantize(model, tokens)
        sites = [entry.name for entry in quantized.plan.quantized if entry.op == "attention"]
        assert sites == [f"model.layers.{at}.self_attn.sdpa" for at in range(2)]
        logits = quantized(**tokens[0]).logits
        assert not torch.equal(logits, model(**tokens[0]).logits)
        torch.testing.assert_close(logits, model(**tokens[0]).logits, atol=0.02, rtol=0.2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"spec": "int8/channel:0/dynamic/sym"}, "write int8/tensor, or int8/token/dynamic"),
        ({"spec": "int8/group:4/dynamic/sym"}, "write int8/tensor, or int8/token/dynamic"),
        ({"spec": "uint8/sym"}, "write int8, and softmax is unsigned all the same"),
        ({"spec": "nvfp4"}, "attention.spec: brevitas cannot do nvfp4"),
    ],
)
def test_refused_specs(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _quantizer(attention=fields)
    assert words in str(caught.value)


def test_refused_without_attention(batches: list[Tensor]) -> None:
    with pytest.raises(QuantizationError, match="never calls scaled_dot_product_attention"):
        _quantizer(attention={}).quantize(nn.Sequential(nn.Linear(8, 8)), batches)


def test_scale_rounding_holds_for_attention(model: nn.Module, batches: list[Tensor]) -> None:
    scales = []
    for rounding in ("ceil", "floor"):
        attending = {"spec": "int8/sym/power_of_two"}
        quantizer = _quantizer(attention=attending, scale_rounding=rounding)
        encodings = {
            found.tensor: found for found in quantizer.quantize(model, batches).encodings()
        }
        scales.append(encodings["0.sdpa.input"].scale)
    assert torch.equal(scales[0], 2 * scales[1])
