"""LSTM, GRU and RNN: taken apart without a change, then quantized like other layers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from quark_brevitas.recurrent import split_all
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from quark_core.errors import ExportError

KINDS: list[tuple[Any, dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    (nn.LSTM, {"proj_size": 3, "bias": False, "bidirectional": True}),
    (nn.GRU, {"num_layers": 2, "dropout": 0.5}),
    (nn.GRU, {"bidirectional": True, "bias": False, "batch_first": True}),
    (nn.RNN, {"num_layers": 2, "bidirectional": True}),
    (nn.RNN, {"nonlinearity": "relu", "batch_first": True}),
]


def _quantizer(**fields: Any) -> BrevitasQuantizer:
    return BrevitasQuantizer(BrevitasConfig(**{"name": "brevitas", "weight": "int8", **fields}))


def _sqnr(truth: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(truth.square().sum() / (truth - found).square().sum()))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, PackedSequence):
        indices = (value.sorted_indices, value.unsorted_indices)
        yield from (value.data, value.batch_sizes, *(one for one in indices if one is not None))
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    else:
        yield value


@pytest.mark.parametrize(("cls", "options"), KINDS)
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kind", ["batch", "one", "packed", "sorted"])
def test_it_computes_what_it_did(cls: Any, options: dict[str, Any], given: bool, kind: str) -> None:
    torch.manual_seed(0)
    whole = cls(4, 6, **options).eval()
    holder = nn.Sequential(copy.deepcopy(whole)).eval()
    split_all(holder)
    sequences = [torch.randn(length, 4) for length in (2, 5, 3)]
    inputs: Any = {
        "batch": torch.randn(3, 3, 4),
        "one": torch.randn(5, 4),
        "packed": pack_sequence(sequences, enforce_sorted=False),
        "sorted": pack_sequence(sorted(sequences, key=len, reverse=True)),
    }[kind]
    state: Any = None
    if given:
        count = whole.num_layers * (1 + whole.bidirectional)
        shape = (count,) if kind == "one" else (count, 3)
        state = torch.randn(*shape, whole.proj_size or 6)
        state = (state, torch.randn(*shape, 6)) if cls is nn.LSTM else state
    found, truth = holder[0](inputs, state), whole(inputs, state)
    for one, other in zip(_tensors(found), _tensors(truth), strict=True):
        torch.testing.assert_close(one, other)


class Net(nn.Module):
    """A convolution with a norm to fold, a recurrent module and a Linear layer."""

    def __init__(self, cls: Any, *, deep: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(8)
        depth = 2 if deep else 1
        self.rnn = cls(8, 16, num_layers=depth, bidirectional=deep, batch_first=True)
        self.head = nn.Linear(16 * depth, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(torch.relu(self.norm(self.conv(x))).transpose(1, 2))
        out: Tensor = self.head(y)
        return out


def _net(cls: Any = nn.LSTM, *, deep: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = Net(cls, deep=deep).eval()
    for parameter in model.rnn.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def sequences() -> list[Tensor]:
    """Inputs for it: [batch, channels, steps]."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 5, 9, generator=generator) for _ in range(4)]


CASES: list[tuple[dict[str, Any], float]] = [
    ({}, 40),
    ({"input": "int8", "bias": "int32"}, 25),
    ({"input": "int8", "bias_correction": True, "activation_equalization": {}}, 25),
    ({"weight": "int4/group:8/asym", "pad_groups": True}, 18),
    ({"weight": "mxfp8_e4m3", "input": "mxfp8_e4m3"}, 22),
    ({"weight": "int4", "rotation": {"mode": "layerwise"}, "awq": {}}, 18),
    ({"weight": "int4", "magr": {}, "low_rank": {"rank": 2}}, 18),
]


@pytest.mark.parametrize(
    ("cls", "fields", "least"),
    [*((nn.LSTM, *case) for case in CASES), *((cls, *CASES[1]) for cls in (nn.GRU, nn.RNN))],
)
def test_passes(
    sequences: list[Tensor], tmp_path: Path, cls: Any, fields: dict[str, Any], least: float
) -> None:
    model, quantizer = _net(cls), _quantizer(**fields)
    quantized = quantizer.quantize(model, sequences)
    names = [entry.name for entry in quantized.plan.quantized]
    assert len(names) == 10
    assert {"rnn.l0.input", "rnn.l1_reverse.hidden", "conv", "head"} <= set(names)
    assert any(step.name == "preprocess" for step in quantized.plan.steps)
    x = torch.cat(sequences)
    with torch.no_grad():
        found = quantized(x)
        assert least < _sqnr(model(x), found) < 70
    quantized.save(tmp_path)
    with torch.no_grad():
        assert torch.equal(quantizer.restore(model, tmp_path)(x), found)


def test_ranges_of_states_are_those_of_sequences(sequences: list[Tensor]) -> None:
    model = _net()
    weights = _quantizer().quantize(model, sequences)
    static = _quantizer(input="int8/sym").quantize(model, sequences)
    found = {encoding.tensor: encoding for encoding in static.encodings()}
    largest = found["rnn.l0.hidden.input"].max
    assert largest is not None
    states = weights.module.get_submodule("rnn.l0").hidden
    seen: list[Tensor] = []
    states.register_forward_pre_hook(lambda _m, args: seen.append(args[0].abs().max()))
    peaks = []
    for batch in sequences:
        seen.clear()
        with torch.no_grad():
            weights(batch)
        peaks.append(torch.stack(seen).max())
    assert float(seen[0]) == 0 < float(seen[1]) < float(peaks[-1])
    assert float(largest) == pytest.approx(float(torch.stack(peaks).mean()), rel=1e-2)


@pytest.mark.parametrize(
    "algorithm", ["gptq", "gpfq", "qronos", {"name": "learned_round", "learning_rate": 0.01}]
)
def test_algorithms_look_at_every_step(sequences: list[Tensor], algorithm: Any) -> None:
    model, x = _net(), torch.cat(sequences)
    if isinstance(algorithm, dict):
        algorithm = {**algorithm, "iterations": 200}
    with torch.no_grad():
        nearest, chosen = (
            _sqnr(model(x), _quantizer(weight="int4", algorithm=one).quantize(model, sequences)(x))
            for one in (None, algorithm)
        )
    # The first step of a sequence has a state of zeros, which tells nothing of its weight.
    assert chosen > nearest + 2


def test_a_layer_called_twice_is_rounded_for_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(16, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            # What the first call is given and what the second is share no channel.
            left = self.shared(torch.cat([x, torch.zeros_like(x)], -1))
            right = self.shared(torch.cat([torch.zeros_like(x), x], -1))
            return torch.cat([left, right], -1)

    torch.manual_seed(0)
    model = Twice().eval()
    mix = torch.randn(8, 8)
    data = [torch.randn(32, 8) @ mix for _ in range(4)]
    x = torch.cat(data)
    with torch.no_grad():
        truth = model(x).chunk(2, -1)
        nearest = _quantizer(weight="int3").quantize(model, data)(x).chunk(2, -1)
        chosen = _quantizer(weight="int3", algorithm="gptq").quantize(model, data)(x).chunk(2, -1)
    for half in range(2):
        assert _sqnr(truth[half], chosen[half]) > _sqnr(truth[half], nearest[half]) + 1


def test_rules_and_what_stays_whole(sequences: list[Tensor]) -> None:
    model = _net()
    skipped = _quantizer(rules=[{"type": "LSTM", "skip": True}]).quantize(model, sequences)
    assert {entry.name for entry in skipped.plan.quantized} == {"conv", "head"}
    assert type(skipped.module.get_submodule("rnn")) is nn.LSTM
    mixed = _quantizer(rules=[{"name": "rnn.l1.hidden", "weight": "int4"}])
    plan = mixed.make_plan(model)
    assert str(plan["rnn.l1.hidden"].weight) == "int4/channel/sym"
    assert str(plan["rnn.l0.hidden"].weight) == "int8/channel/sym"
    along = _quantizer(backend="fx", input="int8").make_plan(model)
    assert along["rnn"].weight is None
    assert "rnn stays float: backend: layerwise takes" in " ".join(along.warnings)


def test_brevitas_own_engine_is_warned_of() -> None:
    algorithm = {"name": "gptq", "engine": "brevitas"}
    plan = _quantizer(algorithm=algorithm).make_plan(_net())
    assert "the first step of a sequence only in rnn.l0.input" in " ".join(plan.warnings)
    assert not _quantizer(algorithm="gptq").make_plan(_net()).warnings


def test_the_model_stays_as_it_was(sequences: list[Tensor]) -> None:
    model = _net()
    before = copy.deepcopy(model.state_dict())
    _quantizer(input="int8", algorithm="gptq").quantize(model, sequences)
    assert type(model.get_submodule("rnn")) is nn.LSTM
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_exports(sequences: list[Tensor], tmp_path: Path) -> None:
    quantized = _quantizer(input="int8").quantize(_net(nn.GRU, deep=False), sequences)
    for form in ("pt2", "onnx_qcdq"):
        written = quantized.export(form, tmp_path / form)
        about = json.loads((tmp_path / f"{written.name}.report.json").read_text())
        assert about["metrics"]["sqnr_db"] > 100
    dynamic = _quantizer(input="int8/token/dynamic/sym", rules=[{"name": "conv", "skip": True}])
    with pytest.raises(
        ExportError, match=r"rnn\.l0\.input\.input: onnx_qcdq cannot hold a dynamic"
    ):
        dynamic.quantize(_net(), sequences).export("onnx_qcdq", tmp_path / "dynamic")


def test_training(sequences: list[Tensor]) -> None:
    model, quantizer = _net(), _quantizer(weight="int3", input="int8")
    quantized = quantizer.quantize(model, sequences)
    x = torch.cat(sequences)
    with torch.no_grad():
        truth, before = model(x), quantized(x)
    module = quantized.module.train()
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        (module(x) - truth).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert _sqnr(truth, quantizer.convert(quantized)(x)) > _sqnr(truth, before) + 1


def test_a_norm_to_fold_and_a_rotation_beside_them(sequences: list[Tensor]) -> None:
    model: Any = _net()
    model.head = nn.Sequential(nn.Linear(32, 32), nn.RMSNorm(32), nn.Linear(32, 4))
    quantized = _quantizer(merge_layernorm=True, rotation={}).quantize(model, sequences)
    assert any("rotating and merging norms" in note for note in quantized.notes)
    x = torch.cat(sequences)
    with torch.no_grad():
        assert 30 < _sqnr(model(x), quantized(x)) < 60


def test_one_of_two_names_is_one_afterwards(sequences: list[Tensor]) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.GRU(5, 5, batch_first=True)
            self.again = self.first

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.again(self.first(x.transpose(1, 2))[0])[0]
            return out

    torch.manual_seed(0)
    model = Shared().eval()
    quantized = _quantizer(input="int8").quantize(model, sequences)
    parts = quantized.module
    assert parts.get_submodule("again") is parts.get_submodule("first")
    assert [entry.name for entry in quantized.plan.quantized] == [
        "first.l0.input",
        "first.l0.hidden",
    ]
    assert type(parts.get_submodule("again.l0.hidden")).__name__ == "QuantLinear"
    with torch.no_grad():
        assert 20 < _sqnr(model(sequences[0]), quantized(sequences[0])) < 60
