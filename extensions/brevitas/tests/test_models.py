"""Models as libraries have them: they read from their layers, skip some, and come in bfloat16."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from quark_brevitas.wrappers import inner
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from quark_core.batch import main_output
from quark_core.errors import DataError, QuantizationError

PASSES: list[dict[str, Any]] = [
    {"activation_equalization": {"alpha": 0.5}},
    {"rotation": {"mode": "layerwise"}},
    {"low_rank": {"rank": 1}},
    {"awq": {"steps": 2}},
    {"algorithm": "gptq"},
]


def _tokens(length: int) -> Tensor:
    return torch.randint(2, 64, (2, length))


def _t5() -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    """Reads the dtype of a layer's weight."""
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    return model, lambda: {"input_ids": _tokens(9), "decoder_input_ids": _tokens(5)}


def _whisper() -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    """Reads the strides of its convolutions."""
    config = transformers.WhisperConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=16,
        max_target_positions=32,
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    return model, lambda: {
        "input_features": torch.randn(2, 8, 32),
        "decoder_input_ids": _tokens(5),
    }


def _mobilenet() -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    """Pads by what it reads from convolutions; untrained, its activations die out."""
    config = transformers.MobileNetV2Config(depth_multiplier=0.35, image_size=32, num_labels=5)
    model = transformers.MobileNetV2ForImageClassification(config)
    return model, lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}


def _llama(**fields: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **fields,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def _quantizer(**fields: Any) -> BrevitasQuantizer:
    config = {"name": "brevitas", "weight": "int4/channel", "input": "int8", **fields}
    return BrevitasQuantizer(BrevitasConfig(**config))


@pytest.mark.parametrize("make", [_t5, _whisper, _mobilenet])
@pytest.mark.parametrize("fields", PASSES, ids=lambda fields: next(iter(fields)))
def test_models_that_read_from_their_layers(
    make: Callable[[], tuple[nn.Module, Callable[[], dict[str, Tensor]]]],
    fields: dict[str, Any],
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model, batch = make()
    model.eval()
    data = [batch() for _ in range(2)]
    quantizer = _quantizer(**fields)
    quantized = quantizer.quantize(model, data)
    quantized.save(tmp_path)
    with torch.no_grad():
        found = main_output(quantized(**data[0]))
        loaded = main_output(quantizer.restore(model, tmp_path)(**data[0]))
    assert torch.isfinite(found).all()
    assert torch.equal(found, loaded)


HALF: list[dict[str, Any]] = [
    *PASSES,
    {"algorithm": "qronos"},
    {"algorithm": {"name": "learned_round", "iterations": 5}},
    {"algorithm": {"name": "learned_round", "iterations": 5, "blocks": "model.layers"}},
    {"awq": {"steps": 3, "mode": "fused"}},
    {"activation_equalization": {"mode": "fused"}},
    {"merge_layernorm": True, "rotation": {}},
    {"magr": {"steps": 3}},
    {"attention": {}},
    {"bias_correction": True},
]


@pytest.mark.parametrize("fields", HALF, ids=str)
def test_models_in_half_precision(fields: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _llama().eval().to(torch.bfloat16)
    data = [{"input_ids": _tokens(9)} for _ in range(2)]
    quantizer = _quantizer(**fields)
    quantized = quantizer.quantize(model, data)
    quantized.save(tmp_path)
    with torch.no_grad():
        wanted = model(**data[0]).logits.float()
        found = quantized(**data[0]).logits
        assert torch.equal(quantizer.restore(model, tmp_path)(**data[0]).logits, found)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - wanted).norm() / wanted.norm()) < 0.5


def test_texts_of_any_length_are_equalized_alike() -> None:
    torch.manual_seed(0)
    model, text = _llama(use_cache=False).eval(), _tokens(12)
    whole = [{"input_ids": text}]
    parts = [{"input_ids": text[:1]}, {"input_ids": text[1:]}]
    padded = [*parts, {"input_ids": text[:, :7]}]
    quantizer = _quantizer(input=None, activation_equalization={"alpha": 0.5})
    with torch.no_grad():
        found = [
            quantizer.quantize(model, data)(**whole[0]).logits for data in (whole, parts, padded)
        ]
    torch.testing.assert_close(found[1], found[0])
    # What comes before a token is all that it depends on.
    torch.testing.assert_close(found[2], found[0])


class Chain(nn.Module):
    """Layers one after the other, a ReLU between."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        for name, layer in zip("abcd", layers, strict=False):
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for name in "abcd":
            if hasattr(self, name):
                x = torch.relu(getattr(self, name)(x))
        return x


def _chain(*layers: nn.Module) -> nn.Module:
    return Chain(*layers).eval()


def test_volumes() -> None:
    torch.manual_seed(0)
    model = _chain(nn.Conv3d(2, 4, 3), nn.ConvTranspose3d(4, 3, 2))
    data = [torch.randn(8, 2, 4, 5, 4).cumsum(-1) for _ in range(2)]
    errors = []
    for algorithm in (None, "gptq"):
        quantized = _quantizer(weight="int3", algorithm=algorithm).quantize(model, data)
        assert [entry.op for entry in quantized.plan.quantized] == ["conv3d", "conv_transpose3d"]
        with torch.no_grad():
            wanted = model.a(data[0])
            errors.append(float((quantized.module.a(data[0]) - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.9 * errors[0]
    encodings = {found.tensor: found for found in quantized.encodings()}
    assert encodings["a.weight"].scale.shape == (4,)
    assert encodings["b.weight"].scale.shape == (3,)


def _not_finite() -> nn.Module:
    model = _chain(nn.Linear(4, 4))
    model.a.weight.data[1, 2] = float("nan")
    return model


def _pruned() -> nn.Module:
    return _chain(prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=2))


def _twice() -> nn.Module:
    layer = nn.Linear(4, 4)
    return _chain(layer, layer)


@pytest.mark.parametrize(
    ("make", "fields", "words"),
    [
        (
            lambda: _chain(nn.ConvTranspose1d(4, 4, 2, groups=2)),
            {},
            "transposed convolution in 2 groups. Write int4/tensor in a rule",
        ),
        (
            lambda: _chain(nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")),
            {"input": "mxfp8"},
            "by padding_mode 'circular'. Write input: int8",
        ),
        (_not_finite, {}, "layer 'a': its weight holds NaN or infinities"),
        (_pruned, {}, "layer 'a': a hook computes the layer's weight anew in each call"),
        (lambda: _chain(nn.LazyLinear(4)), {}, "layer 'a': the layer has no weight yet"),
        (lambda: nn.Linear(4, 4), {}, "model: the model is itself the layer"),
        (lambda: torch.compile(_chain(nn.Linear(4, 4))), {}, "torch.compile has wrapped the model"),
        (_twice, {"backend": "fx"}, "layer 'a': the model calls the layer 2 times"),
        (
            lambda: _chain(nn.Linear(4, 4)).half(),
            {"input": "int8/sym", "bias": "int32"},
            "layer 'a': int32 biases have more digits than float16. Load the model in float32",
        ),
    ],
)
def test_layers_are_refused_before_any_work(
    make: Callable[[], nn.Module], fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(QuantizationError, match=re.escape(words)):
        _quantizer(**fields).make_plan(make())


@pytest.mark.parametrize("fields", [{}, {"algorithm": "gptq"}, {"backend": "fx"}], ids=str)
def test_parametrized_weights_are_quantized(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    parametrized = parametrizations.spectral_norm(nn.Linear(8, 8))
    model = _chain(nn.Linear(8, 8), parametrizations.weight_norm(nn.Linear(8, 8)), parametrized)
    plain = _chain(*(nn.Linear(8, 8) for _ in "abc"))
    with torch.no_grad():
        for name in "abc":
            getattr(plain, name).weight.copy_(getattr(model, name).weight)
            getattr(plain, name).bias.copy_(getattr(model, name).bias)
        data = [torch.randn(6, 8) for _ in range(2)]
        before = model(data[0])
        found = _quantizer(**fields).quantize(model, data)(data[0])
        assert torch.equal(found, _quantizer(**fields).quantize(plain, data)(data[0]))
        assert torch.equal(model(data[0]), before)


@pytest.mark.parametrize("fields", [{}, *PASSES, {"magr": {"steps": 2}}], ids=str)
def test_a_layer_of_two_names_is_one(fields: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    model, data = _chain(layer, layer, nn.Linear(8, 8)), [torch.randn(6, 8) for _ in range(2)]
    quantizer = _quantizer(**fields)
    quantized = quantizer.quantize(model, data)
    assert quantized.module.a is quantized.module.b
    assert hasattr(inner(quantized.module.b), "weight_quant")
    # Its values count once: half as many bytes as of two layers.
    apart = quantizer.quantize(_chain(*(nn.Linear(8, 8) for _ in range(2))), data)
    assert quantized.size_bytes() == apart.size_bytes()
    quantized.save(tmp_path)
    loaded = quantizer.restore(model, tmp_path)
    assert loaded.module.a is loaded.module.b
    assert torch.equal(loaded(data[0]), quantized(data[0]))


def test_hooks_of_layers_stay() -> None:
    model, seen = _chain(nn.Linear(8, 8)), []
    model.a.register_forward_pre_hook(lambda _layer, args: (args[0] * 2,))
    model.a.register_forward_hook(lambda *_: seen.append(1))
    data = [torch.randn(6, 8)]
    quantized = _quantizer(weight="int8", input="int16").quantize(model, data)
    seen.clear()
    with torch.no_grad():
        torch.testing.assert_close(quantized(data[0]), model(data[0]), rtol=0.05, atol=0.05)
    assert len(seen) == 2


class Own(nn.Linear):
    """A class that Brevitas does not know."""


def test_what_brevitas_leaves_is_told() -> None:
    model = _chain(nn.Linear(8, 8), Own(8, 8), Own(8, 8))
    plan = _quantizer().make_plan(model)
    assert [entry.name for entry in plan.quantized] == ["a"]
    told = "b, c stay float: Brevitas replaces Linear, but no class derived from it"
    assert told in plan.warnings
    quantized = _quantizer(input=None).quantize(model)
    again = _quantizer().make_plan(quantized.module)
    assert "a stays as it is: it is one of Brevitas's quantized layers already" in again.warnings


def test_biases_that_are_cut_off_are_named() -> None:
    model, data = _chain(nn.Linear(8, 8), nn.Linear(8, 8)), [torch.rand(6, 8)]
    model.a.bias.data[3] = 50.0
    fields: dict[str, Any] = {"weight": "int8", "input": "int8/sym", "bias": "int16"}
    quantized = _quantizer(**fields).quantize(model, data)
    assert quantized.notes == ["1 bias(es) are cut off, as their integers do not reach: a"]


@pytest.mark.parametrize(
    ("weight", "inputs"),
    [
        ("int4", "int8/token/dynamic"),
        ("int4/group:4/asym", "int8/group:4/dynamic/sym"),
        ("fp8_e5m2", "int8/token/dynamic/sym/power_of_two"),
        ("mxfp4", "mxint8"),
    ],
)
def test_nothing_but_zeros_in_float16(weight: str, inputs: str) -> None:
    model, x = _chain(nn.Linear(8, 8), nn.Linear(8, 8)).half(), torch.rand(6, 8).half()
    model.a.weight.data[2], model.b.weight.data[:, :4] = 0, 0
    x[3] = 0
    quantized = _quantizer(weight=weight, input=inputs).quantize(model, [x])
    with torch.no_grad():
        wanted, found = model(x).float(), quantized(x).float()
    assert float((found - wanted).norm() / wanted.norm()) < 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "algorithm",
    [{"name": "learned_round", "iterations": 20, "learn_scale": True}, {"name": "qronos"}],
    ids=lambda options: options["name"],
)
def test_algorithms_in_other_precision(algorithm: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = _chain(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)
    data = [torch.rand(16, 8, dtype=dtype) for _ in range(2)]
    found = _quantizer(input=None, algorithm=algorithm).quantize(model, data)(data[0])
    with torch.no_grad():
        wanted = model(data[0]).float()
    assert found.dtype == dtype
    assert float((found.float() - wanted).norm() / wanted.norm()) < 0.3


@pytest.mark.parametrize(
    "fields",
    [{}, {"magr": {}}, {"awq": {}}, {"activation_equalization": {}}, {"algorithm": "gptq"}],
    ids=str,
)
def test_calibration_that_cannot_be_learned_from(fields: dict[str, Any]) -> None:
    model, x = _chain(nn.Linear(8, 8), nn.Linear(8, 8)), torch.rand(6, 8)
    quantizer = _quantizer(**fields)
    for bad, words in (
        (x[:0], "a calibration batch has no samples"),
        (x * float("nan"), "a calibration batch holds NaN"),
    ):
        with pytest.raises(DataError, match=words):
            quantizer.quantize(model, [x, bad])
    with pytest.raises(QuantizationError, match="layer 'a': the layer receives values that are"):
        quantizer.quantize(model, [x, x * float("inf")])


def test_batch_norm_is_calibrated() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).eval()
    batch = torch.randn(8, 2, 4, 4) * 3
    fields: dict[str, Any] = {"weight": "int2", "input": None, "merge_bn": False}
    quantizer = _quantizer(calibrate_bn=True, **fields)
    quantized = quantizer.quantize(model, [batch])
    assert not any(module.training for module in quantized.module.modules())
    with torch.no_grad():
        seen = quantized.module.get_submodule("0")(batch).transpose(0, 1).flatten(1)
    norm = quantized.module.get_submodule("1")
    torch.testing.assert_close(norm.running_mean, seen.mean(1))
    torch.testing.assert_close(norm.running_var, seen.var(1))
    assert norm.momentum == model[1].momentum


@pytest.mark.parametrize("name", ["gptq", "gpfq", "qronos"])
def test_brevitas_engine_is_saved(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = _chain(nn.Linear(8, 8), nn.Linear(8, 8)), [torch.rand(6, 8)]
    quantizer = _quantizer(algorithm={"name": name, "engine": "brevitas"})
    quantized = quantizer.quantize(model, data)
    assert quantized.size_bytes() == _quantizer().quantize(model, data).size_bytes()
    quantized.save(tmp_path)
    assert torch.equal(quantizer.restore(model, tmp_path)(data[0]), quantized(data[0]))


class Words(nn.Module):
    """Calls a layer by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(16, 8), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(input=self.table(tokens))
        return out


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"algorithm": "gptq"}, "layer 'head': the model calls the layer by keyword"),
        ({"bias_correction": True}, "layer 'head': the model calls the layer by keyword"),
    ],
    ids=str,
)
def test_calls_that_brevitas_cannot_follow(fields: dict[str, Any], words: str) -> None:
    data = [torch.randint(16, (2, 5))]
    with pytest.raises(QuantizationError, match=words):
        _quantizer(**fields).quantize(Words().eval(), data)


class Halves(nn.Module):
    """Cuts up what a layer returns, which Brevitas's quantized tensors do not know."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).chunk(2, -1)
        out: Tensor = self.last(left * right)
        return out


def test_graphs_that_do_not_run_are_refused_before_calibration() -> None:
    words = "backend: fx: the model does not run on the quantized tensors"
    with pytest.raises(QuantizationError, match=words):
        _quantizer(backend="fx", input="int8").quantize(Halves().eval(), [torch.randn(3, 8)])
