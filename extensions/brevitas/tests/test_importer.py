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
