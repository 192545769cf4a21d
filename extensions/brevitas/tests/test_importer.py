"""Configurations of Quark's extension, read as ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.importer import from_quark

from quark_core.errors import ConfigError


class Scheme(Enum):
    per_channel = "per_channel"
    per_tensor = "per_tensor"


@dataclass(frozen=True)
class QTensorConfig:
    qscheme: Scheme = Scheme.per_tensor
    symmetric: bool = True
    scale_type: str = "float"
    quant_type: str = "int_quant"
    param_type: str = "stats"
    bit_width: int = 8
    exponent_bit_width: int | None = None
    mantissa_bit_width: int | None = None


@dataclass
class QLayerConfig:
    input_tensors: QTensorConfig | None = None
    output_tensors: QTensorConfig | None = None
    weight: QTensorConfig | None = None
    bias: QTensorConfig | None = None


@dataclass
class GPTQ:
    act_order: bool = False


@dataclass
class BiasCorrection:
    pass


@dataclass
class Config:
    global_quant_config: QLayerConfig
    pre_quant_opt_config: list[Any] | None = None
    algo_config: list[Any] = field(default_factory=list)
    backend: str = "layerwise"


def test_objects() -> None:
    layer = QLayerConfig(
        input_tensors=QTensorConfig(symmetric=False),
        weight=QTensorConfig(qscheme=Scheme.per_channel, bit_width=4),
        bias=QTensorConfig(bit_width=32),
    )
    found = from_quark(Config(layer, algo_config=[GPTQ(act_order=True), BiasCorrection()]))
    assert found == {
        "name": "brevitas",
        "merge_bn": True,
        "equalize_iterations": 20,
        "equalize_merge_bias": True,
        "weight": "int4/channel/sym",
        "input": "int8/tensor/asym/percentile:99.999",
        "bias": "int32",
        "narrow_range": True,
        "algorithm": {"name": "gptq", "act_order": True},
        "bias_correction": True,
    }
    assert BrevitasConfig(**found).bias_correction


def test_mappings() -> None:
    found = from_quark(
        {
            "global_quant_config": {
                "weight": {
                    "quant_type": "float_quant",
                    "exponent_bit_width": 4,
                    "mantissa_bit_width": 3,
                    "param_type": "mse",
                }
            },
            "pre_quant_opt_config": [{"type": "ActivationEqualization", "alpha": 0.7}],
        }
    )
    assert found["weight"] == "fp[1|4|3]/tensor/sym/mse"
    assert found["activation_equalization"] == {"mode": "layerwise", "alpha": 0.7}
    assert found["merge_bn"] is False
    assert "narrow_range" not in found
    BrevitasConfig(**found)


def test_every_place_without_counterpart_is_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        from_quark(
            {
                "backend": "fx",
                "global_quant_config": {
                    "weight": {
                        "quant_type": "float_quant",
                        "bit_width": 8,
                        "exponent_bit_width": 7,
                        "mantissa_bit_width": 3,
                    },
                    "output_tensors": {"bit_width": 8},
                },
                "algo_config": [{"type": "GPFA2Q"}, {"type": "Mystery"}],
            }
        )
    assert [problem.path for problem in caught.value.problems] == [
        "backend",
        "global_quant_config.weight",
        "global_quant_config.output_tensors",
        "algo_config[1]",
    ]


def test_accumulator_widths_are_kept() -> None:
    found = from_quark(
        {
            "global_quant_config": {
                "weight": {"bit_width": 4},
                "input_tensors": {"bit_width": 8},
            },
            "algo_config": [{"type": "GPFA2Q", "act_order": True, "accumulator_bit_width": 18}],
        }
    )
    wanted = {"name": "gpfq", "act_order": True, "accumulator": {"bits": 18}}
    assert found["algorithm"] == wanted
    assert BrevitasConfig(**found).algorithm is not None


def test_default_weights_are_those_of_the_quantizer_quarks_extension_uses() -> None:
    torch = pytest.importorskip("torch")
    from brevitas.nn import QuantLinear
    from brevitas.quant.scaled_int import Int8WeightPerChannelFloat
    from quark_brevitas.quantizer import BrevitasQuantizer

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6)).eval()
    layer = QLayerConfig(weight=QTensorConfig(qscheme=Scheme.per_channel, bit_width=4))
    found = BrevitasConfig(**from_quark(Config(layer, pre_quant_opt_config=[])))
    theirs = QuantLinear(8, 6, True, weight_quant=Int8WeightPerChannelFloat, weight_bit_width=4)
    theirs.weight.data, theirs.bias.data = model[0].weight.data, model[0].bias.data
    x = torch.randn(5, 8)
    assert torch.equal(BrevitasQuantizer(found).quantize(model)(x), theirs.eval()(x))


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        ({"exclude": ["*head"]}, "exclude", "Config has no such field"),
        (
            {"global_quant_config": {"weight": {"group_size": 32}}},
            "global_quant_config.weight.group_size",
            "QTensorConfig has no such field",
        ),
        (
            {"global_quant_config": {"weight": {"qscheme": "per_group"}}},
            "global_quant_config.weight.qscheme",
            "per_group: Quark's extension knows per_tensor and per_channel here",
        ),
        (
            {"global_quant_config": {"input_tensors": {"qscheme": "per_channel"}}},
            "global_quant_config.input_tensors.qscheme",
            "knows per_tensor here",
        ),
        (
            {"global_quant_config": {"bias": {"bit_width": 24}}},
            "global_quant_config.bias.bit_width",
            "biases have 16 or 32 bits here, not 24",
        ),
        (
            {"global_quant_config": {"weight": {"param_type": "hqo"}}},
            "global_quant_config.weight.param_type",
            "known are stats and mse",
        ),
        (
            {"pre_quant_opt_config": [{"type": "ActivationEqualization", "beta": 1}]},
            "pre_quant_opt_config[0].beta",
            "it has alpha, is_layerwise",
        ),
        (
            {"algo_config": [{"type": "GPFQ", "percentage_of_processed_inputs": 0.5}]},
            "algo_config[0].percentage_of_processed_inputs",
            "write 1.0",
        ),
        (
            {"algo_config": [{"type": "BiasCorrection"}, {"type": "GPTQ"}]},
            "algo_config[1]",
            "GPTQ runs before BiasCorrection here",
        ),
        ({"algo_config": [{"type": "AWQConfig"}]}, "algo_config[0]", "write awq: {}"),
        ({"algo_config": [{"type": "QuaRot"}]}, "algo_config[0]", "rotation: {}"),
        ({"algo_config": [{"type": "SVDQuant"}]}, "algo_config[0]", "low_rank: {rank: 32}"),
        (
            {"algo_config": [{"type": "GPTQ"}, {"type": "GPFQ"}]},
            "algo_config[1]",
            "there is an algorithm already",
        ),
    ],
)
def test_each_place_says_why(changes: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_quark(changes)
    (problem,) = caught.value.problems
    assert problem.path == path
    assert words in str(caught.value)


def test_all_passes_of_the_extension() -> None:
    passes = ["GPFQ", "CalibrateBatchNorm", "BiasCorrection"]
    found = from_quark(
        {
            "global_quant_config": {"weight": {}, "input_tensors": {"bit_width": 8}},
            "pre_quant_opt_config": [
                {
                    "type": "Preprocess",
                    "trace_model": True,
                    "merge_batch_norm": False,
                    "equalize_iterations": 0,
                    "channel_splitting_ratio": 0.1,
                    "channel_splitting_split_input": True,
                },
                {"type": "ActivationEqualization"},
            ],
            "algo_config": [{"type": name} for name in passes],
        }
    )
    config = BrevitasConfig(**found)
    assert (config.channel_splitting, config.split_inputs) == (0.1, True)
    assert config.calibrate_bn
    assert config.bias_correction
    assert config.activation_equalization is not None
    assert config.activation_equalization.mode == "layerwise"
    assert config.algorithm is not None
    assert config.algorithm.name == "gpfq"
    assert config.narrow_range


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("config.json", "configuration: is a str: give Quark's Config or the same as a mapping"),
        (None, "configuration: is a NoneType"),
        ({"global_quant_config": "int8"}, "global_quant_config: 'int8' is not accepted"),
        ({"global_quant_config": {"weight": "int8"}}, "global_quant_config.weight: 'int8' is not"),
        (
            {"algo_config": {"type": "GPTQ"}},
            "algo_config: {'type': 'GPTQ'} is not accepted: write a",
        ),
        ({"algo_config": ["gptq"]}, "algo_config[0]: 'gptq' is not accepted: write a mapping"),
    ],
)
def test_what_has_not_the_shape_of_a_configuration(given: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_quark(given)
    assert words in str(caught.value)
