"""Whole models: plans, flows, shared weights, switches."""

from __future__ import annotations

import copy

import pytest
import torch
from quark_native.config import NativeConfig
from quark_native.nn import QuantizedLayer
from quark_native.quantizer import NativeQuantizer
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from quark_core.batch import Batch
from quark_core.errors import DataError, QuantizationError, UnmatchedRuleError


def native(**config: object) -> NativeQuantizer:
    return NativeQuantizer(NativeConfig(name="native", **config))


class Block(nn.Module):
    """A convolution with BatchNorm, a shortcut, pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(images)))
        x = x + self.mix(x)
        return self.head(x.mean((2, 3)))


class Tied(nn.Module):
    """An embedding whose weight is also the classifier's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


def images() -> list[Tensor]:
    return [torch.randn(4, 3, 8, 8) for _ in range(3)]


CONFIGS = {
    "static": {"weight": "int8/channel", "input": "int8"},
    "dynamic": {"weight": "int8/channel", "input": "int8/dynamic"},
    "weight only": {"weight": "int4/group:4"},
    "microscaling": {"weight": "mxfp8", "input": "mxfp8"},
    "everything": {
        "weight": "fp8/channel",
        "input": "fp8/percentile:99.99",
        "output": "uint8/mse",
        "bias": "int16/tensor",
    },
}


class TestPlan:
    def test_every_known_layer_is_listed_with_its_decision(self):
        plan = native(
            weight="int8", input="int8", rules=[{"name": "head", "skip": True}]
        ).make_plan(Block())
        assert [entry.name for entry in plan.entries] == ["conv", "mix", "head"]
        assert [entry.op for entry in plan.entries] == ["conv2d", "conv2d", "linear"]
        assert plan["conv"].shape == (8, 3, 3, 3)
        assert str(plan["conv"].weight) == "int8/channel/sym"
        assert str(plan["conv"].input) == "int8/tensor/asym"
        assert plan["head"].reason == "skipped by the rule"
        assert plan["head"].rule == "rules[0] (name: head)"
        assert plan.needs_calibration
        assert [step.name for step in plan.steps] == ["calibrate", "encode"]

    @pytest.mark.parametrize("name", CONFIGS)
    def test_calibration_is_needed_for_static_ranges_only(self, name):
        plan = native(**CONFIGS[name]).make_plan(Block())
        assert plan.needs_calibration == (name in ("static", "everything"))

    def test_planning_changes_nothing(self):
        model = Block()
        before = {name: type(module) for name, module in model.named_modules()}
        native(weight="int8", input="int8").make_plan(model, Batch((images()[0],)))
        assert {name: type(module) for name, module in model.named_modules()} == before

    def test_ends_of_the_model_are_found_by_running_it(self):
        rules = [{"io": "input", "input": "uint8"}, {"io": "output", "skip": True}]
        plan = native(weight="int8", rules=rules).make_plan(Block(), images()[0])
        assert str(plan["conv"].input) == "uint8/tensor/asym"
        assert plan["mix"].input is None
        assert not plan["head"].quantized

    def test_ends_of_the_model_need_an_example(self):
        quantizer = native(weight="int8", rules=[{"io": "input", "skip": True}])
        with pytest.raises(DataError, match=r"a rule with io needs one batch.*data\.calibration"):
            quantizer.make_plan(Block())

    def test_a_rule_without_a_layer_is_an_error(self):
        quantizer = native(weight="int8", rules=[{"name": "haed", "skip": True}])
        with pytest.raises(UnmatchedRuleError, match=r"matches no layer .nearest: head"):
            quantizer.make_plan(Block())

    def test_types_match_subclasses_and_qualified_names(self):
        rules = [{"type": "torch.nn.Conv2d", "weight": "int4"}, {"type": "Block", "op": "linear"}]
        plan = native(weight="int8", rules=rules).make_plan(Block())
        assert str(plan["mix"].weight) == "int4/channel/sym"
        assert plan["head"].rule == "rules[1] (type: Block, op: linear)"

    def test_a_weight_without_the_axis_stays_float(self):
        plan = native(weight="int8/channel:2").make_plan(Block())
        assert plan["conv"].quantized
        assert not plan["head"].quantized
        reason = "weight cannot be int8/channel:2/sym: there is no axis 2 in a tensor of shape"
        assert plan["head"].reason.startswith(reason)
        assert plan.warnings == (f"head stays float: {plan['head'].reason}",)

    def test_an_embeddings_indices_are_not_quantized(self):
        plan = native(weight="int8", input="int8", bias="int8").make_plan(Tied())
        assert plan["embed"].input is None
        assert plan["embed"].bias is None
        assert plan["embed"].reason == "its input holds indices and stays as it is"
        assert plan["body"].bias is not None
        assert plan["head"].bias is None

    def test_computed_weights_stay_float(self):
        model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
        plan = native(weight="int8").make_plan(model)
        assert "computed by a hook or parametrization" in plan["0"].reason
        assert plan["1"].quantized

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (lambda: nn.LazyLinear(4), "its shape is not known yet"),
            (
                lambda: nn.Embedding(4, 4, max_norm=1.0),
                "max_norm changes the weight during forward",
            ),
            (lambda: nn.Linear(0, 4), "its weight is empty"),
            (
                lambda: nn.Linear(4, 4).to(torch.complex64),
                "its weight is complex64, not floating point",
            ),
        ],
    )
    def test_what_cannot_be_quantized_stays_float(self, make, reason):
        assert reason in native(weight="int8").make_plan(nn.Sequential(make()))["0"].reason

    def test_a_quantized_layer_is_not_quantized_again(self):
        quantized = native(weight="int8").quantize(nn.Sequential(nn.Linear(4, 4)))
        plan = native(weight="int4").make_plan(quantized.module)
        assert plan["0"].reason == "it is quantized already"

    def test_scales_that_outweigh_their_codes_are_pointed_out(self):
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3))
        (warning,) = native(weight="int4/group:32").make_plan(model).warnings
        assert warning.startswith("0.weight takes no less room as int4/group:32/sym: one scale")


class TestQuantize:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_the_result_is_close_and_the_model_untouched(self, name):
        model, batches = Block().eval(), images()
        before = copy.deepcopy(model.state_dict())
        quantized = native(**CONFIGS[name]).quantize(model, batches)
        x = batches[0]
        error = (quantized(x) - model(x)).norm() / model(x).norm()
        assert 0 < error < 0.2
        assert all(torch.equal(before[key], model.state_dict()[key]) for key in before)
        assert not any(isinstance(module, QuantizedLayer) for module in model.modules())

    def test_in_place_changes_the_model_itself(self):
        model = Block()
        quantized = native(weight="int8").quantize(model, inplace=True)
        assert quantized.module is model
        assert isinstance(model.conv, QuantizedLayer)

    def test_encodings_tell_everything(self):
        quantized = native(**CONFIGS["everything"]).quantize(Block(), images())
        found = {encoding.tensor: encoding for encoding in quantized.encodings()}
        assert len(found) == 3 * 3 + 2
        weight, output = found["conv.weight"], found["conv.output"]
        assert (weight.format, weight.granularity, weight.axis) == ("fp8_e4m3", "channel", 0)
        assert weight.scale.shape == weight.max.shape == (8,)
        assert weight.zero_point is None
        assert torch.equal(weight.max, weight.scale * 448)
        assert (output.symmetric, output.axis, output.zero_point.dtype) == (
            False,
            None,
            torch.int32,
        )
        assert output.min == -output.zero_point * output.scale
        assert torch.isclose(output.max, output.min + 255 * output.scale)

    def test_measured_scales_are_dynamic_encodings(self):
        quantized = native(weight="mxfp4", input="mxfp4").quantize(Block())
        by_name = {encoding.tensor: encoding for encoding in quantized.encodings()}
        assert by_name["conv.input"].dynamic
        assert by_name["conv.input"].scale is None
        assert by_name["conv.input"].axis == -3
        assert by_name["conv.weight"].scale.shape == (8, 1, 3, 3)
        assert by_name["conv.weight"].scale_format == "e8m0"

    def test_calibration_is_in_float(self):
        model, batches = Block().eval(), images()
        quantized = native(weight="int2", input="int8").quantize(model, batches)
        features = torch.stack([torch.relu(model.bn(model.conv(x))) for x in batches])
        encoding = {e.tensor: e for e in quantized.encodings()}["mix.input"]
        torch.testing.assert_close(encoding.max, features.max(), rtol=1e-6, atol=0)

    def test_gradients_reach_the_input(self):
        quantized = native(weight="int8", input="int8").quantize(Block(), images())
        x = images()[0].requires_grad_()
        quantized(x).sum().backward()
        assert x.grad.abs().sum() > 0
        assert all(parameter.grad is None for parameter in quantized.module.conv.parameters())

    def test_a_layer_under_two_names_is_one_layer(self):
        shared = nn.Linear(4, 4)
        quantized = native(weight="int8").quantize(nn.Sequential(shared, nn.ReLU(), shared))
        assert [entry.name for entry in quantized.plan.entries] == ["0"]
        assert quantized.layer("0") is quantized.layer("2")
        assert isinstance(quantized.layer("2"), QuantizedLayer)
        assert quantized.size_bytes() == 16 + 4 * 4 + 4 * 4

    def test_the_model_itself_can_be_the_layer(self):
        layer, x = nn.Linear(4, 4), torch.randn(2, 4)
        quantized = native(weight="int8", input="int8").quantize(layer, [x])
        assert not torch.equal(quantized(x), layer(x))
        assert quantized.size_bytes() == 16 + 4 * 4 + 4 * 4 + 5

    def test_a_layer_that_no_batch_reaches_is_named(self):
        class Idle(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.used(x)

        with pytest.raises(
            QuantizationError, match=r"tensor 'idle\.input': no value was observed.*by a rule"
        ):
            native(input="int8").quantize(Idle(), [torch.randn(2, 4)])

    @pytest.mark.parametrize("spec", ["int8", "mxfp4", "bfp[8|8]{16}"])
    def test_weights_that_are_not_finite_are_named(self, spec):
        model = Block()
        model.mix.weight.data[0, 0] = torch.nan
        with pytest.raises(
            QuantizationError, match=r"tensor 'mix\.weight': the float values hold NaN"
        ):
            native(weight=spec).quantize(model)

    def test_inputs_that_are_not_finite_are_named(self):
        with pytest.raises(
            QuantizationError, match=r"tensor 'conv\.input': the observed values hold NaN"
        ):
            native(input="int8").quantize(Block(), [torch.full((1, 3, 8, 8), torch.inf)])

    def test_half_precision_models(self):
        model = Block().to(torch.bfloat16)
        for config in CONFIGS.values():
            quantized = native(**config).quantize(model, images())
            assert quantized(images()[0].bfloat16()).dtype == torch.bfloat16


class TestTransformers:
    """torch's own transformer layers take shortcuts around the layers inside them."""

    def test_the_fused_encoder_layer_steps_aside(self):
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
        x = torch.randn(2, 5, 16)
        with torch.no_grad():
            float_output = layer(x)
            quantized = native(input="int2/dynamic").quantize(layer)
            assert (quantized(x) - float_output).abs().max() > 0.1
        static = native(input="int8").quantize(layer, [x])
        assert {e.tensor for e in static.encodings()} == {"linear1.input", "linear2.input"}

    def test_attentions_projection_is_quantized_in_its_weight_only(self):
        layer = nn.MultiheadAttention(16, 2, batch_first=True)
        plan = native(weight="int8", input="int8").make_plan(layer)
        assert plan["out_proj"].input is None
        assert plan["out_proj"].weight is not None
        assert "reads its weight without calling it" in plan["out_proj"].reason
        x = torch.randn(2, 5, 16)
        batch = Batch((x, x, x))
        quantized = native(weight="int2").quantize(layer, [batch])
        with torch.no_grad():
            assert (quantized(x, x, x)[0] - layer(x, x, x)[0]).abs().max() > 1e-3


class TestSharedWeights:
    ids = torch.randint(0, 30, (2, 7))

    def test_equal_specs_keep_the_weight_shared(self):
        quantized = native(weight="int4/group:8").quantize(Tied())
        model = quantized.module
        assert model.head.weight is model.embed.weight
        assert model.head.packed["weight"] is model.embed.packed["weight"]
        assert {e.tensor for e in quantized.encodings()} == {
            "embed.weight",
            "body.weight",
            "head.weight",
        }
        assert quantized.plan.warnings == ()
        codes, scales = 30 * 16 // 2, 30 * 2 * 4
        assert quantized.storage()["embed.weight"] == codes + scales
        assert "head.weight" not in quantized.storage()

    def test_a_skipped_partner_keeps_the_float_weight(self):
        model = Tied()
        quantized = native(weight="int4", rules=[{"name": "head", "skip": True}]).quantize(model)
        assert torch.equal(quantized.module.head.weight, model.head.weight)
        assert not torch.equal(quantized.module.embed.weight, model.head.weight)
        (warning,) = quantized.plan.warnings
        assert warning == (
            "embed and head share one weight in the float model; quantized differently, it is "
            "stored more than once"
        )
        assert quantized.storage()["head.weight"] == 30 * 16 * 4

    def test_different_specs_part_ways(self):
        rules = [{"name": "head", "weight": "int8"}]
        quantized = native(weight="int4", rules=rules).quantize(Tied())
        found = {e.tensor: e.format for e in quantized.encodings()}
        assert (found["embed.weight"], found["head.weight"]) == ("int4", "int8")
        assert not torch.equal(quantized.module.head.weight, quantized.module.embed.weight)

    def test_one_partner_can_be_switched_alone(self):
        quantized = native(weight="int2").quantize(Tied())
        quantized.set_enabled("head", False)
        assert not torch.equal(quantized.module.head.weight, quantized.module.embed.weight)
        quantized.set_enabled("head", True)
        assert torch.equal(quantized.module.head.weight, quantized.module.embed.weight)


class TestSwitches:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_all_layers_off_is_the_float_model(self, name):
        model, x = Block().eval(), images()[0]
        quantized = native(**CONFIGS[name]).quantize(model, images())
        before = quantized(x)
        for entry in quantized.plan.quantized:
            quantized.set_enabled(entry.name, False)
        assert torch.equal(quantized(x), model(x))
        for entry in quantized.plan.quantized:
            quantized.set_enabled(entry.name, True)
        assert torch.equal(quantized(x), before)

    def test_an_unknown_layer_is_named_with_what_is_near(self):
        quantized = native(weight="int8").quantize(Block())
        with pytest.raises(
            QuantizationError, match=r"layer 'haed': no such quantized layer.*Did you mean 'head'"
        ):
            quantized.set_enabled("haed", False)

    def test_without_the_float_weights_there_is_no_switch(self):
        quantized = native(weight="int8", keep_float=False).quantize(Block())
        assert not any("float_" in name for name, _ in quantized.module.named_buffers())
        with pytest.raises(
            QuantizationError, match=r"layer 'head': the float weight was not kept.*keep_float"
        ):
            quantized.set_enabled("head", False)
