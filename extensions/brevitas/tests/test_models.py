"""Models as libraries have them: they read from their layers, skip some, and come in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

from quark_core.batch import main_output

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
