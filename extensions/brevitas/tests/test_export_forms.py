"""Models of every kind the backend makes, in every form: a file that was run, or a refusal."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

from quark_core.batch import Batch, as_batch, main_output
from quark_core.errors import ExportError
from quark_core.export import write_export
from quark_core.registry import registry

STATIC = {"weight": "int8", "input": "int8/sym/percentile:99.99"}
FORMS = ("onnx_qcdq", "qonnx", "torch_qcdq", "pt2", "gguf", "checkpoint", "encodings")
LLAMA = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": False,
}


class Net(nn.Module):
    """Two convolutions and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.side = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        out: Tensor = self.fc(torch.flatten(self.side(y) + y, 1))
        return out


class Wide(nn.Module):
    """Linear layers, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 48)
        self.second = nn.Linear(48, 32)
        self.never = nn.Linear(32, 32)
        self.third = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.third(torch.relu(self.second(torch.relu(self.first(x)))))
        return out


class Attentive(nn.Module):
    """A block that calls scaled dot-product attention."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (12, 8)).transpose(1, 2).chunk(3, 1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Whole(nn.Module):
    """torch's own MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(32, 4, batch_first=True)
        self.out = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.attend(x, x, x, need_weights=False)[0])
        return out


class Tied(nn.Module):
    """An output layer with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 32)
        self.middle = nn.Linear(32, 32)
        self.head = nn.Linear(32, 96, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.middle(self.embed(ids)))
        return out


def llama() -> nn.Module:
    """A Llama of transformers with one block."""
    import transformers

    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 4, 4)


def vectors(count: int) -> Tensor:
    return torch.randn(count, 32)


def sequences(count: int) -> Tensor:
    return torch.randn(count, 6, 32)


def tokens(count: int) -> Tensor:
    return torch.randint(96, (count, 6))


def prompts(count: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(96, (count, 12))}


NO_LLAMA = {"gguf": "gguf holds transformers' Llama models, not"}
NO_PT2 = tuple(form for form in FORMS if form != "pt2")
INTEGERS = ("onnx_qcdq", "qonnx", "torch_qcdq")
GROUPS = dict.fromkeys(INTEGERS, "cannot hold groups: it holds one scale a tensor or channel")
RUNTIME = dict.fromkeys(INTEGERS, "cannot hold a dynamic scale: it holds static ones only")
INPUTS = {"gguf": r"layer 'model.layers.0.self_attn.q_proj': gguf cannot hold a quantized input"}
TURNED = {"merge_layernorm": True, "rotation": {"online": True}}


@dataclass(frozen=True)
class Case:
    """A model and its configuration.

    Attributes:
        build: The float model.
        data: So many samples for it.
        fields: Of the configuration.
        refused: Words of the refusal, by form; all other forms are written.
        trained: Whether it is trained after quantization.
        forms: To try; tracing a transformers model for pt2 takes a while, others do for it.
    """

    build: Callable[[], nn.Module]
    data: Callable[[int], Any]
    fields: dict[str, Any]
    refused: dict[str, str] = field(default_factory=lambda: NO_LLAMA)
    trained: bool = False
    forms: tuple[str, ...] = FORMS


CASES = {
    "static": Case(Net, images, STATIC),
    "asymmetric": Case(Net, images, {"weight": "int4/asym", "input": "uint8/asym"}),
    "trained": Case(Net, images, {**STATIC, "bias": "int32"}, trained=True),
    "fx": Case(
        Net,
        images,
        {
            "weight": "int8/tensor/power_of_two",
            "input": "int8/sym/power_of_two",
            "backend": "fx",
            "bias": "int32",
        },
    ),
    "fx with zero points": Case(
        Net,
        images,
        {"weight": "int8/tensor/power_of_two", "input": "int8/power_of_two", "backend": "fx"},
        {**NO_LLAMA, "onnx_qcdq": r"35\.\d dB.*Write input: int8/sym/power_of_two, or use qonnx"},
    ),
    "dynamic": Case(
        Wide, vectors, {"weight": "int8", "input": "int8/token/dynamic"}, {**NO_LLAMA, **RUNTIME}
    ),
    "rotated": Case(Wide, vectors, {**STATIC, "rotation": {"mode": "layerwise"}}),
    "rotated in blocks": Case(
        Wide, vectors, {**STATIC, "rotation": {"mode": "layerwise", "block_size": 16}}
    ),
    "smooth": Case(Wide, vectors, {**STATIC, "activation_equalization": {}}),
    "factors": Case(Wide, vectors, {"weight": "int4/channel", "awq": {"steps": 4}}),
    "factors and groups": Case(
        Wide, vectors, {"weight": "int4/group:16", "awq": {"steps": 4}}, {**NO_LLAMA, **GROUPS}
    ),
    "branches": Case(Wide, vectors, {**STATIC, "low_rank": {"rank": 4}}),
    "attention": Case(Attentive, sequences, {**STATIC, "attention": {}}),
    "whole attention": Case(Whole, sequences, {**STATIC, "attention": {}}),
    "tied": Case(Tied, tokens, STATIC),
    "tied, head float": Case(Tied, tokens, {**STATIC, "rules": [{"name": "head", "skip": True}]}),
    "llama": Case(llama, prompts, STATIC, INPUTS),
    "llama, weights": Case(llama, prompts, {"weight": "int8/channel"}, {}, forms=NO_PT2),
    "llama, groups": Case(llama, prompts, {"weight": "int4/group:32/asym"}, GROUPS, forms=NO_PT2),
    "llama, trained": Case(
        llama, prompts, {"weight": "int4/group:32"}, GROUPS, trained=True, forms=NO_PT2
    ),
    "llama, turned": Case(
        llama,
        prompts,
        {"weight": "int8", **TURNED},
        {"gguf": r"layer 'model\.layers\.0.*proj': gguf cannot hold a rotation at run time"},
    ),
    "llama, factors": Case(
        llama,
        prompts,
        {"weight": "int4/group:32", "awq": {"steps": 4}},
        {**GROUPS, "gguf": "gguf cannot hold factors that a layer's input is multiplied by"},
        forms=NO_PT2,
    ),
    "llama, branches": Case(
        llama,
        prompts,
        {"weight": "int4/channel", "low_rank": {"rank": 4}},
        {"gguf": r"q_proj': gguf cannot hold a float branch of low rank\. Leave low_rank out"},
        forms=NO_PT2,
    ),
    "llama, attention": Case(
        llama,
        prompts,
        {"weight": "int8/channel", "attention": {}},
        {"gguf": r"self_attn\.sdpa': gguf cannot hold quantized attention"},
    ),
}


@dataclass(frozen=True)
class Made:
    """A quantized model with what it was made from."""

    quantizer: BrevitasQuantizer
    model: nn.Module
    quantized: Any


@functools.cache
def made(name: str) -> Made:
    """The quantized model of a case: one for all tests, as exports leave it as it is."""
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build().eval()
    data = [case.data(4) for _ in range(2)]
    quantizer = BrevitasQuantizer(BrevitasConfig(name="brevitas", **case.fields))
    quantized = quantizer.quantize(model, data)
    if case.trained:
        example = quantized.example
        module = quantized.module.train()
        optimizer = torch.optim.SGD(module.parameters(), 0.01)
        for batch in data:
            optimizer.zero_grad()
            main_output(as_batch(batch).run(module)).square().mean().backward()
            optimizer.step()
        quantized = quantizer.convert(quantized)
        assert quantized.example is example
    return Made(quantizer, model, quantized)


def _state(module: nn.Module) -> tuple[dict[str, Tensor], list[bool]]:
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return tensors, [part.training for part in module.modules()]


def _answer(module: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        return main_output(batch.run(module))


def _run_onnx(path: Path, batch: Batch) -> Tensor:
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feed = dict(zip(names, (tensor.numpy() for tensor in batch.tensors()), strict=True))
    return torch.from_numpy(session.run(None, feed)[0])


def _check(form: str, written: Path, case: str, batch: Batch) -> None:
    """A file computes what the module does, for a number of samples it has not seen."""
    entry = made(case)
    module = entry.quantized.module
    truth = _answer(module, batch)
    if form == "onnx_qcdq":
        found = _run_onnx(written, batch)
    elif form == "torch_qcdq":
        found = main_output(torch.jit.load(str(written))(*batch.tensors()))
    elif form == "pt2":
        found = _answer(torch.export.load(written).module(), batch)
    elif form == "checkpoint":
        found = _answer(entry.quantizer.restore(entry.model, written).module, batch)
    elif form == "encodings":
        rows = json.loads(written.read_text())["encodings"]
        assert {row["layer"] for row in rows} == {
            layer.name for layer in entry.quantized.plan.quantized
        }
        return
    else:
        # Proven by the export itself; QONNX has no runtime, and GGUF tests read blocks.
        report = json.loads((written.parent / f"{written.name}.report.json").read_text())
        assert report["metrics"]["sqnr_db"] > 45
        return
    assert found.shape == truth.shape
    assert float((found - truth).norm() / truth.norm()) < 1e-4


PAIRS = [(name, form) for name, case in CASES.items() for form in case.forms]


@pytest.mark.parametrize(("case", "form"), PAIRS)
def test_written_and_run_or_refused(tmp_path: Path, case: str, form: str) -> None:
    if case.startswith("llama") or form == "gguf":
        pytest.importorskip("transformers")
        pytest.importorskip("gguf")
    if "onnx" in form:
        pytest.importorskip("onnxoptimizer")
    quantized, refused = made(case).quantized, CASES[case].refused.get(form)
    backend = registry().get("quantizer", "brevitas")
    tensors, training = _state(quantized.module)
    probe = as_batch(CASES[case].data(5))
    before = _answer(quantized.module, probe)
    if refused:
        with pytest.raises(ExportError, match=refused) as caught:
            write_export(form, quantized, tmp_path, quantized.example, backend)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())
    else:
        written = write_export(form, quantized, tmp_path, quantized.example, backend)
        extra = {f"{written.name}.report.json"} if form in FORMS[:5] else {f"{form}.safetensors"}
        assert {path.name for path in tmp_path.iterdir()} <= {written.name} | extra
        _check(form, written, case, probe)
    after, still = _state(quantized.module)
    assert list(after) == list(tensors)
    assert all(torch.equal(after[name], tensors[name]) for name in tensors)
    assert still == training
    assert torch.equal(_answer(quantized.module, probe), before)
