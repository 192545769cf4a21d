"""GGUF files hold the codes of Brevitas's quantizers, in ggml's blocks."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

from quark_core.errors import ExportError

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": False,
}
HEAD = {"rules": [{"name": "lm_head", "skip": True}]}


def _quantized(*, tied: bool = True, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config).eval()
    data = [{"input_ids": torch.randint(96, (2, 12))} for _ in range(2)]
    quantizer = BrevitasQuantizer(BrevitasConfig(name="brevitas", **fields))
    return quantizer.quantize(model, data)


def _half(value: bytes) -> float:
    return float(struct.unpack("<e", value)[0])


def _unpack(kind: str, block: bytes) -> list[float]:
    """One block of 32 values, as ggml-common.h lays it out."""
    if kind == "Q8_0":
        return [code * _half(block[:2]) for code in struct.unpack("<32b", block[2:34])]
    start = 4 if kind == "Q4_1" else 2
    codes = [byte & 15 for byte in block[start:]] + [byte >> 4 for byte in block[start:]]
    if kind == "Q4_1":
        return [code * _half(block[:2]) + _half(block[2:4]) for code in codes]
    return [(code - 8) * _half(block[:2]) for code in codes]


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates rows 2i and 2i + 1 of a head together, transformers i and i + half."""
    rows = []
    size = weight.shape[0] // heads
    for head in range(heads):
        for at in range(size // 2):
            rows += [head * size + at, head * size + size // 2 + at]
    return weight[rows]


CASES: list[tuple[dict[str, Any], str, int]] = [
    ({"weight": "int4/group:32"}, "Q4_0", 18),
    ({"weight": "int3"}, "Q4_0", 18),
    ({"weight": "int4/group:64/asym", "algorithm": "gptq"}, "Q4_1", 20),
    ({"weight": "uint4/group:32/asym", "hqo": True, "round_zero_points": False}, "Q4_1", 20),
    ({"weight": "int8/tensor"}, "Q8_0", 34),
    ({"weight": "int6/group:32"}, "Q8_0", 34),
]


@pytest.mark.parametrize(("fields", "kind", "size"), CASES)
def test_blocks_hold_the_weights(
    tmp_path: Path, fields: dict[str, Any], kind: str, size: int
) -> None:
    quantized = _quantized(**fields, **HEAD)
    written = quantized.export("gguf", tmp_path / "model")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(written).tensors}
    for name, place, heads in [
        ("model.layers.1.self_attn.q_proj", "blk.1.attn_q.weight", 4),
        ("model.layers.0.self_attn.k_proj", "blk.0.attn_k.weight", 2),
        ("model.layers.0.mlp.down_proj", "blk.0.ffn_down.weight", 0),
    ]:
        tensor = tensors[place]
        assert tensor.tensor_type.name == kind
        data = tensor.data.tobytes()
        blocks = [data[at : at + size] for at in range(0, len(data), size)]
        layer: Any = quantized.layer(name)
        with torch.no_grad():
            numbers = layer.quant_weight()
        expected = numbers.value.detach()
        codes = 128 if kind == "Q8_0" else 32
        tolerance = numbers.scale.detach().expand_as(expected) * codes * 2**-11
        found = torch.tensor([_unpack(kind, block) for block in blocks]).reshape(expected.shape)
        if heads:
            expected, tolerance = (_interleaved(part, heads) for part in (expected, tolerance))
        # Codes are equal; scales, and the smallest values of Q4_1, are rounded to 11 bits.
        assert ((found - expected).abs() <= tolerance).all()
        assert not torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_the_file_computes_what_the_module_computes(tmp_path: Path, tied: bool, head: bool) -> None:
    quantized = _quantized(weight="int4/group:32", tied=tied, **({} if head else HEAD))
    written = quantized.export("gguf", tmp_path / "model")
    about = json.loads((tmp_path / f"{written.name}.report.json").read_text())
    assert about["metrics"]["sqnr_db"] > 60
    reader = gguf.GGUFReader(written)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.block_count"] == 2
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.freq_base"] == pytest.approx(10000.0)
    assert fields["llama.vocab_size"] == 96
    names = {tensor.name for tensor in reader.tensors}
    assert {"token_embd.weight", "output_norm.weight", "blk.1.ffn_gate.weight"} <= names
    assert ("output.weight" in names) == (head or not tied)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weight": "mxfp4"}, r"mxfp4_e2m1: it holds integers.*int4/group:32"),
        ({"weight": "int8/asym"}, r"int8/asym.*int8/group:32 or int4/group:32/asym"),
        ({"weight": "int4/group:16"}, r"groups of 16.*int4/group:32"),
        ({"weight": "int4", "input": "int8/dynamic"}, r"a quantized input.*Leave input out"),
        ({"weight": "int12"}, r"int12"),
    ],
)
def test_what_it_cannot_hold_is_refused(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        _quantized(**fields).export("gguf", tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_other_models_are_refused(tmp_path: Path) -> None:
    quantizer = BrevitasQuantizer(BrevitasConfig(name="brevitas", weight="int4"))
    quantized = quantizer.quantize(nn.Sequential(nn.Linear(32, 32)), [torch.zeros(1, 32)])
    with pytest.raises(ExportError, match="holds transformers' Llama models, not Sequential"):
        quantized.export("gguf", tmp_path / "model")
    assert not list(tmp_path.iterdir())
