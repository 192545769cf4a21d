"""The backend at work: plans, rules, numbers, saving."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

from quark_core.errors import QuantizationError, UnmatchedRuleError


def _quantizer(**fields: Any) -> BrevitasQuantizer:
    return BrevitasQuantizer(BrevitasConfig(**{"name": "brevitas", "weight": "int8", **fields}))


STATIC = {"input": "int8/percentile:99.99"}


def test_the_float_model_is_untouched(tiny: nn.Module, batches: list[Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    _quantizer(**STATIC, equalize_iterations=5, bias_correction=True).quantize(tiny, batches)
    after = tiny.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("backend", ["layerwise", "fx"])
def test_numbers_describe_what_the_layer_computes(
    tiny: nn.Module, batches: list[Tensor], backend: str
) -> None:
    quantized = _quantizer(**STATIC, backend=backend).quantize(tiny, batches)
    encodings = {encoding.tensor: encoding for encoding in quantized.encodings()}
    assert set(encodings) == {
        f"{layer}.{role}"
        for layer in ("conv", "up", "conv1d", "up1d", "fc")
        for role in ("weight", "input")
    }
    for entry in quantized.plan.quantized:
        layer: Any = quantized.module.get_submodule(entry.name)
        encoding = encodings[f"{entry.name}.weight"]
        assert encoding.scale is not None
        shape = [1] * layer.weight.ndim
        shape[encoding.axis or 0] = -1
        scale = encoding.scale.view(shape)
        codes = (layer.weight / scale).round().clamp(-128, 127)
        torch.testing.assert_close(layer.quant_weight().value, codes * scale)
        assert encoding.zero_point is not None
        assert not encoding.zero_point.any()


@pytest.mark.parametrize("text", ["int8/asym", "uint8/asym", "int4/asym/tensor", "uint4/sym"])
def test_asymmetric_weights_have_integer_zero_points(
    tiny: nn.Module, batches: list[Tensor], text: str
) -> None:
    quantized = _quantizer(weight=text).quantize(tiny)
    for encoding in quantized.encodings():
        layer: Any = quantized.module.get_submodule(encoding.layer)
        assert encoding.scale is not None
        assert encoding.zero_point is not None
        shape = [1] * layer.weight.ndim
        if encoding.axis is not None:
            shape[encoding.axis] = -1
        scale = encoding.scale.view(shape) if encoding.axis is not None else encoding.scale
        zero = encoding.zero_point.view(shape) if encoding.axis is not None else encoding.zero_point
        bits = int(encoding.format.removeprefix("u").removeprefix("int"))
        low = 0 if encoding.format.startswith("u") else -(2 ** (bits - 1))
        codes = (layer.weight / scale).round() + zero
        value = (codes.clamp(low, low + 2**bits - 1) - zero) * scale
        torch.testing.assert_close(layer.quant_weight().value, value)
        assert torch.all(encoding.zero_point >= low)
        assert torch.all(encoding.zero_point <= low + 2**bits - 1)


def test_inputs_are_reported_on_the_promised_grid(tiny: nn.Module, batches: list[Tensor]) -> None:
    quantized = _quantizer(input="int8").quantize(tiny, batches)
    encoding = next(e for e in quantized.encodings() if e.tensor == "conv.input")
    assert encoding.scale is not None
    assert encoding.zero_point is not None
    assert encoding.min is not None
    assert encoding.max is not None
    low = torch.stack([batch.min() for batch in batches]).mean()
    high = torch.stack([batch.max() for batch in batches]).mean()
    assert encoding.format == "int8"
    assert float(encoding.min) == pytest.approx(float(low), abs=float(encoding.scale))
    assert float(encoding.max) == pytest.approx(float(high), abs=float(encoding.scale))


def test_rules_differ_by_layer(tiny: nn.Module, batches: list[Tensor]) -> None:
    rules = [
        {"name": "fc", "skip": True},
        {"type": "Conv2d", "weight": "int4/channel", "input": None},
    ]
    quantized = _quantizer(**STATIC, rules=rules).quantize(tiny, batches)
    found = {encoding.tensor: encoding.format for encoding in quantized.encodings()}
    assert "fc.weight" not in found
    assert found["conv.weight"] == "int4"
    assert "conv.input" not in found
    assert found["up.input"] == "int8"
    assert type(quantized.module.get_submodule("fc")) is nn.Linear


def test_token_scales_are_one_a_row() -> None:
    layer = nn.Linear(6, 3)
    model = nn.Sequential(layer)
    quantized = _quantizer(input="int8/token/dynamic/sym").quantize(model)
    x = torch.randn(2, 4, 6) * torch.logspace(-2, 2, 4)[:, None]
    scale = x.abs().amax(-1, keepdim=True) / 128
    rounded = (x / scale).round().clamp(-128, 127) * scale
    weight: Any = quantized.module.get_submodule("0")
    expected = nn.functional.linear(rounded, weight.quant_weight().value, layer.bias)
    torch.testing.assert_close(quantized(x), expected, rtol=1e-3, atol=1e-3)


def test_token_scales_leave_convolutions_float(tiny: nn.Module) -> None:
    plan = _quantizer(input="int8/token/dynamic/sym").make_plan(tiny)
    assert [entry.name for entry in plan.quantized] == ["fc"]
    told = "conv, up, conv1d, up1d stay float: token scales belong to Linear layers"
    assert told in plan.warnings


def test_unmatched_rule(tiny: nn.Module) -> None:
    with pytest.raises(UnmatchedRuleError, match="nearest: conv1d"):
        _quantizer(rules=[{"name": "con1d", "skip": True}]).quantize(tiny)


def test_plan_orders_the_passes_and_touches_nothing(tiny: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    plan = _quantizer(**STATIC, bias="int32", bias_correction=True).make_plan(tiny)
    assert [step.name for step in plan.steps] == [
        "preprocess",
        "layerwise rewriting",
        "calibrate",
        "bias correction",
    ]
    assert plan["conv"].bias is not None  # folding BatchNorm gives it one
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.state_dict().items())


class Branching(nn.Module):
    """Cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.fc(x))
        return out if out.sum() > 0 else -out


def test_untraceable_model_keeps_its_batch_norm_with_a_warning() -> None:
    quantizer = _quantizer()
    plan = quantizer.make_plan(Branching())
    assert "BatchNorm stays apart: the model cannot be traced" in plan.warnings[0]
    assert quantizer.quantize(Branching()).encodings()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"backend": "fx", **STATIC}, "backend: fx needs a model that can be traced"),
        ({"equalize_iterations": 3}, "equalize_iterations: 3 needs a model that can be traced"),
    ],
)
def test_untraceable_model_is_refused_where_tracing_is_needed(
    fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(QuantizationError) as caught:
        _quantizer(**fields).make_plan(Branching())
    assert words in str(caught.value)
    name = next(iter(fields))
    assert f"Write {name}: {'layerwise' if name == 'backend' else 0}." in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {**STATIC, "bias": "int32"},
        {**STATIC, "bias_correction": True},
        {**STATIC, "backend": "fx", "bias": "int16", "bias_correction": True},
        {"input": "int8/token/dynamic/sym"},
        {"weight": "int4/asym"},
        {"weight": "int4/group:2/asym", "pad_groups": True},
        {"weight": "mxfp4", "input": "mxfp8"},
        {"weight": "fp8_e4m3", "input": "fp8_e5m2/mse"},
        {"weight": "int4", **STATIC, "algorithm": "gptq", "bias_correction": True},
        {"weight": "int3", "algorithm": {"name": "learned_round", "iterations": 5}},
        {**STATIC, "activation_equalization": {}},
        {**STATIC, "activation_equalization": {"mode": "fx"}, "magr": {"steps": 3}},
        {**STATIC, "channel_splitting": 0.3},
    ],
)
def test_saved_models_come_back_exactly(
    tiny: nn.Module, batches: list[Tensor], tmp_path: Path, fields: dict[str, Any]
) -> None:
    quantizer = _quantizer(**fields)
    quantized = quantizer.quantize(tiny, batches)
    quantized.save(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".json"}
    loaded = quantizer.restore(tiny, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]), quantized(batches[0]))
    for one, other in zip(quantized.encodings(), loaded.encodings(), strict=True):
        assert one.tensor == other.tensor
        assert one.scale is other.scale or torch.equal(one.scale, other.scale)  # type: ignore[arg-type]
    assert loaded.size_bytes() == quantized.size_bytes()


def test_files_of_another_configuration_do_not_load(tiny: nn.Module, tmp_path: Path) -> None:
    _quantizer().quantize(tiny).save(tmp_path)
    other = _quantizer(**STATIC)
    with pytest.raises(QuantizationError, match="the saved state does not fit the prepared model"):
        other.restore(tiny, tmp_path)


def test_layers_can_be_switched(tiny: nn.Module, batches: list[Tensor]) -> None:
    quantized = _quantizer(**STATIC).quantize(tiny, batches)
    with torch.no_grad():
        whole, truth = quantized(batches[0]), tiny(batches[0])
        for entry in quantized.plan.quantized:
            quantized.set_enabled(entry.name, False)
        torch.testing.assert_close(quantized(batches[0]), truth, atol=1e-5, rtol=1e-4)
        for entry in quantized.plan.quantized:
            quantized.set_enabled(entry.name, True)
        assert torch.equal(quantized(batches[0]), whole)
    with pytest.raises(QuantizationError, match="no quantized layer 'conv3'"):
        quantized.set_enabled("conv3", False)


def test_storage_counts_what_is_left_after_folding(tiny: nn.Module, batches: list[Tensor]) -> None:
    sizes = _quantizer(**STATIC).quantize(tiny, batches).storage()
    assert "bn.weight" not in sizes
    assert sizes["conv.weight"] == 4 * 2 * 9 + 4 * 4
    assert sizes["conv.bias"] == 4 * 4
    assert sizes["conv.input"] == 4 + 1
    assert "conv.input_quant" not in " ".join(sizes)


def test_folded_layers_are_compared_with_their_batch_norm(
    tiny: nn.Module, batches: list[Tensor]
) -> None:
    quantized = _quantizer(**STATIC).quantize(tiny, batches)
    assert quantized.counterpart("conv") == "bn"
    assert quantized.counterpart("fc") == "fc"
    equalized = _quantizer(**STATIC, equalize_iterations=2).quantize(tiny, batches)
    assert equalized.counterpart("conv") is None


def test_dictionaries_calibrate() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.fc = nn.Linear(8, 11)

        def forward(self, *, input_ids: Tensor) -> dict[str, Tensor]:
            return {"logits": self.fc(self.embed(input_ids))}

    tokens = [{"input_ids": torch.arange(10).reshape(2, 5)}]
    quantized = _quantizer(**STATIC).quantize(Keyword(), tokens)
    assert quantized(**tokens[0])["logits"].shape == (2, 5, 11)


def test_zero_points_between_integers_are_told_and_counted(tiny: nn.Module) -> None:
    rules = [{"glob": "*", "weight": "int4/tensor/asym"}]
    plain = _quantizer(rules=rules).quantize(tiny)
    found = _quantizer(rules=rules, hqo=True, round_zero_points=False).quantize(tiny)
    encoding = next(e for e in found.encodings() if e.tensor == "fc.weight")
    assert encoding.zero_point is not None
    assert encoding.zero_point.is_floating_point()
    assert (
        found.storage()["fc.weight"] == plain.storage()["fc.weight"] + 3
    )  # 4 bytes, where 4 bits took one


@pytest.mark.parametrize(
    "fields", [{"weight": "int3", "narrow_range": True}, {"weight": "int3/narrow"}], ids=str
)
def test_narrow_range_leaves_the_smallest_code_out(tiny: nn.Module, fields: dict[str, Any]) -> None:
    quantized = _quantizer(**fields).quantize(tiny)
    for encoding in quantized.encodings():
        layer: Any = quantized.layer(encoding.layer)
        assert encoding.min is not None
        assert encoding.max is not None
        assert torch.equal(encoding.min, -encoding.max)
        assert layer.quant_weight().int().min() == -3


def test_groups_that_do_not_divide_are_refused_with_the_nearest(tiny: nn.Module) -> None:
    rules = [{"type": "Conv2d", "skip": True}, {"glob": "up*", "skip": True}]
    fields: dict[str, Any] = {"weight": "int4/group:4", "rules": rules}
    with pytest.raises(QuantizationError) as caught:
        _quantizer(**fields).make_plan(tiny)
    assert str(caught.value) == (
        "plan, layer 'conv1d': groups of 4 do not divide the 3 inputs of the layer. Write group:3 "
        "in a rule for it, or pad_groups: true."
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"algorithm": "gptq"},
            "gptq leaves transposed convolutions and embeddings to the nearest codes: up, up1d",
        ),
        ({"hqo": True}, "hqo searches 5 weights in up to"),
        ({"weight": "mxfp4"}, "quark-native reads the exponent's bits instead"),
    ],
)
def test_plans_warn(tiny: nn.Module, fields: dict[str, Any], words: str) -> None:
    assert words in " ".join(_quantizer(**fields).make_plan(tiny).warnings)


def test_plan_gives_the_whole_order_with_reasons(tiny: nn.Module) -> None:
    plan = _quantizer(
        **STATIC,
        equalize_iterations=2,
        activation_equalization={},
        magr={},
        algorithm="qronos",
        bias_correction=True,
    ).make_plan(tiny)
    assert [step.name for step in plan.steps] == [
        "preprocess",
        "activation equalization",
        "magr",
        "layerwise rewriting",
        "calibrate",
        "qronos",
        "bias correction",
    ]
    assert all(step.reason for step in plan.steps)


def test_static_and_block_inputs_mix(tiny: nn.Module, batches: list[Tensor]) -> None:
    rules = [{"type": "Conv2d", "input": "mxfp8"}, {"name": "fc", "input": "int8/dynamic"}]
    quantized = _quantizer(**STATIC, rules=rules).quantize(tiny, batches)
    dynamic = {e.layer for e in quantized.encodings() if e.dynamic}
    assert dynamic == {"conv", "fc"}
    with torch.no_grad():
        assert torch.isfinite(quantized(batches[0])).all()


def test_brevitas_may_be_imported_by_us_first() -> None:
    script = (
        "import torch; from quark_brevitas.wrappers import inner;"
        "layer = torch.nn.Linear(1, 1); assert inner(layer) is layer"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _tied() -> nn.Module:
    """A network whose output layer shares its weight with the embedding."""
    torch.manual_seed(5)
    model = nn.Sequential()
    model.add_module("embed", nn.Embedding(32, 16))
    model.add_module("fc", nn.Linear(16, 16))
    model.add_module("relu", nn.ReLU())
    model.add_module("out", nn.Linear(16, 32, bias=False))
    model.get_submodule("out").weight = model.get_submodule("embed").weight
    return model.eval()


@pytest.mark.parametrize("algorithm", ["gptq", "gpfq", "qronos", "learned_round", None])
@pytest.mark.parametrize("more", [{}, {"magr": {"steps": 5}}, {"equalize_iterations": 5}])
def test_an_embedding_stays_when_the_layer_tied_to_it_changes(
    algorithm: str | None, more: dict[str, Any], tmp_path: Path
) -> None:
    model, tokens = _tied(), [torch.arange(32).reshape(4, 8)]
    given: Any = {"name": algorithm, "iterations": 5} if algorithm == "learned_round" else algorithm
    quantizer = _quantizer(weight="int3", algorithm=given, **more)
    quantized = quantizer.quantize(model, tokens)
    embedding = quantized.module.get_submodule("embed")
    assert torch.equal(embedding(tokens[0]), model.get_submodule("embed")(tokens[0]))
    quantized.save(tmp_path)
    with torch.no_grad():
        found = quantizer.restore(model, tmp_path)(tokens[0])
        assert torch.equal(found, quantized(tokens[0]))


@pytest.mark.parametrize(("rules", "times"), [([{"name": "out", "skip": True}], 1), ([], 2)])
def test_a_tied_weight_is_stored_once_or_once_more_as_codes(rules: list[Any], times: int) -> None:
    quantized = _quantizer(weight="int8/tensor", rules=rules).quantize(_tied())
    storage = quantized.storage()
    assert storage["embed.weight"] == 32 * 16 * 4
    assert ("out.weight" in storage) == (times == 2)


class WithUnused(nn.Module):
    """A layer is defined and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 1)
        self.bn = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(torch.relu(self.bn(self.conv(x))).mean(-1))
        return out


@pytest.mark.parametrize(
    "fields",
    [{"backend": "fx"}, {"algorithm": "gptq"}, {"activation_equalization": {"alpha": 0.5}}],
)
def test_layers_missing_from_the_graph_stay_float(fields: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(6)
    model, data = WithUnused().eval(), [torch.randn(4, 8, 5) for _ in range(2)]
    quantizer = _quantizer(**STATIC, bias="int32", **fields)
    quantized = quantizer.quantize(model, data)
    assert quantized.plan["unused"].reason == "stays float: the model never calls it"
    assert {encoding.layer for encoding in quantized.encodings()} == {"conv", "fc"}
    quantized.save(tmp_path)
    with torch.no_grad():
        assert torch.equal(quantizer.restore(model, tmp_path)(data[0]), quantized(data[0]))


def test_layers_that_calibration_never_called_are_named() -> None:
    model, data = WithUnused().eval(), [torch.randn(4, 8, 5)]
    quantized = _quantizer(**STATIC, merge_bn=False).quantize(model, data)
    note = "calibration never called 1 layer(s), whose input scales are arbitrary: unused"
    assert note in quantized.notes
    assert not _quantizer(merge_bn=False).quantize(model, data).notes
