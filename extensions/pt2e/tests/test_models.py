"""Models with something special in them: each is handled, or refused in plain words."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quark_pt2e.backends.arm import EthosUBackend
from quark_pt2e.backends.desktop import XnnpackBackend
from quark_pt2e.config.arm import EthosUConfig
from quark_pt2e.config.desktop import XnnpackConfig
from torch import Tensor, nn

from quark_core.batch import Batch
from quark_core.errors import QuantizationError

INT8 = {"weight": "int8", "input": "int8/mse"}


def _ethosu(**more: Any) -> EthosUBackend:
    return EthosUBackend(EthosUConfig(name="ethos-u", **{**INT8, **more}))


def _noise(model: nn.Module, quantized: Any, *inputs: Tensor) -> float:
    with torch.no_grad():
        truth, found = model(*inputs), quantized(*inputs)
    return float(10 * torch.log10(truth.square().sum() / (truth - found).square().sum()))


class Scaled(nn.Module):
    """A convolution whose result is halved: ExecuTorch folds the factor into the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x) * 0.5
        return out


def test_the_float_model_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model, images = Scaled().eval(), torch.randn(8, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    quantized = _ethosu().quantize(model, [images])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert _noise(model, quantized, images) > 30


class Branching(nn.Module):
    """A branch in Python on a tensor's values."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        out: Tensor = self.fc(x)
        return out


@pytest.mark.parametrize("strict", [None, True])
def test_python_branches_are_named(strict: bool | None) -> None:
    with pytest.raises(QuantizationError) as caught:
        _ethosu(strict=strict).make_plan(Branching().eval(), torch.randn(2, 4))
    text = str(caught.value)
    assert "branches in Python on the values of a tensor" in text
    assert "torch.cond" in text
    if strict is None:
        assert "test_models.py" in text
        assert "if x.sum() > 0" in text


class Looping(nn.Module):
    """A loop whose length depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.while_loop import while_loop

        def again(count: Tensor, _value: Tensor) -> Tensor:
            return count < 3

        def step(count: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            return count + 1, torch.relu(self.fc(value))

        out: Tensor = while_loop(again, step, (torch.tensor(0), x))[1]
        return out


def test_loops_are_refused() -> None:
    with pytest.raises(QuantizationError, match=r"while_loop cannot be quantized.*torch\.cond"):
        _ethosu().make_plan(Looping().eval(), torch.randn(2, 4))


class Attention(nn.Module):
    """One head of attention that may not look ahead."""

    def __init__(self, hidden: float) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.hidden = hidden
        self.register_buffer("ahead", torch.ones(6, 6).triu(1).bool())

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 8**0.5
        weights = scores.masked_fill(self.ahead, self.hidden).softmax(-1)
        out: Tensor = weights @ self.value(x)
        return out


def test_infinite_masks_are_warned_of() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(8, 6, 8)
    found = {}
    for hidden in (float("-inf"), -20.0):
        torch.manual_seed(1)
        model = Attention(hidden).eval()
        quantized = _ethosu().quantize(model, [inputs])
        warned = any("infinite constants" in text for text in quantized.plan.warnings)
        assert warned == (hidden == float("-inf"))
        found[hidden] = _noise(model, quantized, inputs)
    assert found[-20.0] > found[float("-inf")] + 3


class Recurrent(nn.Module):
    """An LSTM and its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.lstm(x)[0][:, -1])
        return out


def test_lstm() -> None:
    torch.manual_seed(0)
    model, inputs = Recurrent().eval(), torch.randn(16, 5, 4)
    quantized = _ethosu().quantize(model, [inputs])
    assert _noise(model, quantized, inputs) > 20
    inside = [entry for entry in quantized.plan.quantized if entry.name.startswith("lstm.")]
    assert len(inside) > 20
    # XNNPACK has no pattern for it, and the plan says so.
    plan = XnnpackBackend(XnnpackConfig(name="xnnpack", **INT8)).make_plan(model, inputs)
    left = [entry for entry in plan.entries if entry.name.startswith("lstm")]
    assert left
    assert all("has no pattern for it" in entry.reason for entry in left if not entry.quantized)


class Sharing(nn.Module):
    """One layer called twice, keyword arguments, two named results."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.mix = nn.Linear(6, 6)
        self.last = nn.Linear(6, 2)

    def forward(self, ids: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        x = self.mix(torch.relu(self.mix(self.table(ids)))) * scale
        return {"logits": self.last(x.mean(1)), "hidden": x}


def test_shared_layers_and_named_results() -> None:
    torch.manual_seed(0)
    model = Sharing().eval()
    batch = Batch((torch.randint(0, 10, (4, 5)),), {"scale": torch.rand(4, 5, 6)})
    quantized = _ethosu().quantize(model, [batch])
    with torch.no_grad():
        found, truth = batch.run(quantized), batch.run(model)
    assert found.keys() == truth.keys()
    for name in truth:
        assert torch.allclose(found[name], truth[name], atol=0.05 * float(truth[name].abs().max()))
    assert {"mix.linear", "mix.linear_1"} <= {entry.name for entry in quantized.plan.entries}
    assert quantized.counterpart("mix.linear") is None
    assert quantized.counterpart("mix.linear_1") == "mix"


class OneByOne(nn.Module):
    """A shape that holds for one sample only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.view(1, 12))
        return out


def test_fixed_shapes_get_samples_one_by_one() -> None:
    torch.manual_seed(0)
    model, images = OneByOne().eval(), torch.randn(8, 3, 4)
    backend = _ethosu()
    quantized = backend.quantize(model, list(images[:, None]))
    assert quantized.record == {
        "samples": 8,
        "skipped": 0,
        "branches": {},
        "batch": "static",
    }
    with torch.no_grad():
        several = quantized(images)
        single = torch.cat([quantized(image[None]) for image in images])
    assert quantized.notes == ["the graph takes one sample at a time: larger batches are cut up"]
    assert several.shape == (8, 3)
    assert torch.equal(several, single)


def test_a_branch_without_samples_is_told(cond_model: nn.Module, golden_inputs: Any) -> None:
    images = torch.from_numpy(golden_inputs["calib_x"])
    data = [Batch((image[None], torch.ones(1))) for image in images]
    with pytest.warns(UserWarning, match=r"no sample took the branch cond\.false"):
        quantized = _ethosu().quantize(cond_model, data)
    assert any("cond.false" in text for text in quantized.plan.warnings)
    assert quantized.notes == [
        f"{len(data)} of {len(data)} calibration samples took the branch cond.true",
        f"0 of {len(data)} calibration samples took the branch cond.false",
    ]


def test_calibration_stops_when_ranges_settle() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    batch = torch.randn(32, 4)
    settle = {"tolerance": 0.01, "patience": 2}
    backend = _ethosu(input="int8", settle=settle)
    quantized = backend.quantize(model, [batch] * 10)
    assert quantized.record["samples"] == 3 * 32
    assert quantized.record["skipped"] == 7 * 32
    told = "calibration stopped after 96 of 320 samples: no range moved any more (settle)"
    assert quantized.notes == [told]
    everything = _ethosu(input="int8").quantize(model, [batch] * 10)
    assert everything.record["skipped"] == 0
    assert torch.equal(quantized(batch), everything(batch))


def test_headroom_widens_activations_only() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 2)).eval(), torch.randn(32, 4) * 40
    tables = []
    for headroom in (1.0, 1.5):
        backend = _ethosu(input="int16/sym", headroom=headroom)
        rows = backend.quantize(model, [inputs]).encodings()
        tables.append({row.tensor: row.scale for row in rows})
    plain, wide = tables
    assert torch.allclose(wide["0.input"], plain["0.input"] * 1.5)
    assert torch.equal(wide["0.weight"], plain["0.weight"])


class Residual(nn.Module):
    """An addition within a module, and an activation after it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.fc(x) + x)
        return out


def test_counterparts_are_what_computes_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Residual(), nn.Linear(4, 2)).eval()
    quantized = _ethosu().quantize(model, [torch.randn(8, 4)])
    pairs = {entry.name: quantized.counterpart(entry.name) for entry in quantized.plan.entries}
    assert pairs["0.fc"] == "0.fc"
    assert pairs["0.add"] is None
    assert pairs["0.act"] == "0.act"


def test_no_example_no_plan() -> None:
    with pytest.raises(QuantizationError, match="needs example inputs"):
        _ethosu().make_plan(nn.Linear(2, 2))


def test_layers_can_be_listened_to(golden_model: nn.Module, golden_inputs: Any) -> None:
    images = torch.from_numpy(golden_inputs["test"])
    quantized = _ethosu().quantize(golden_model, [torch.from_numpy(golden_inputs["calib"])])
    assert quantized.counterpart("stem") == "bn"
    assert quantized.counterpart("block1.add") == "block1"
    heard: list[Tensor] = []
    tap = quantized.layer("block1.add")
    assert tap is not None
    handle = tap.register_forward_hook(lambda _m, _a, output: heard.append(output))
    truth: list[Tensor] = []
    golden_model.get_submodule("block1").register_forward_hook(
        lambda _m, _a, output: truth.append(output)
    )
    with torch.no_grad():
        listened = quantized(images)
        handle.remove()
        assert torch.equal(listened, quantized(images))
        golden_model(images)
    assert len(heard) == 1
    noise = (heard[0] - truth[0]).square().sum() / truth[0].square().sum()
    assert 0 < float(noise) < 0.01
