"""What configurations accept and refuse, and the methods under ExecuTorch's names."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from quark_pt2e import schemes
from quark_pt2e.backends.arm import EthosUBackend, TosaBackend, VgfBackend
from quark_pt2e.config.arm import EthosUConfig, TosaConfig, VgfConfig
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from quark_core.errors import ConfigError, QuantizationError, UnmatchedRuleError
from quark_core.plan import Plan
from quark_core.registry import registry

NAMES = {
    "ethos-u",
    "vgf",
    "tosa",
    "xnnpack",
    "x86-inductor",
    "arm-inductor",
    "cortex-m",
    "coreml",
    "qnn",
    "vulkan",
    "cadence",
    "embedding",
    "pt2e",
}


def _plan(model: nn.Module, config: EthosUConfig) -> Plan:
    return EthosUBackend(config).make_plan(model, torch.randn(2, 3, 32, 32))


def test_all_names_are_there_and_light() -> None:
    assert {entry.spec.name for entry in registry().entries("quantizer")} >= NAMES
    code = (
        "import sys, quark_pt2e.plugin as p\n"
        "from quark_core.registry import registry\n"
        "for spec in p.quark_quantizers(): registry().config_class(spec.name)\n"
        "bad = {'torch', 'torchao', 'executorch', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_executorchs_methods() -> None:
    config = (
        EthosUConfig(name="ethos-u")
        .set_global(schemes.int8())
        .set_io(schemes.uint8_io())
        .set_module_name("block1", None)
        .set_module_type(nn.Linear, schemes.a16w8())
    )
    assert str(config.input) == "int8/tensor/asym/mse"
    selectors = [rule.describe() for rule in config.rules]
    assert selectors == [
        "io: input",
        "io: output",
        "name: block1",
        "type: torch.nn.modules.linear.Linear",
    ]
    assert config.rules[2].skip
    assert str(config.rules[3].input) == "int16/tensor/sym/mse"
    # Each call returns a configuration of its own.
    assert EthosUConfig(name="ethos-u").set_global(schemes.int8()).rules == ()
    assert config.set_global(None).input is None


def test_types_include_subclasses_and_last_match_wins(golden_model: nn.Module) -> None:
    class Special(nn.Conv2d):
        pass

    golden_model.expand.__class__ = Special  # type: ignore[assignment]
    rules = [{"type": "Conv2d", "skip": True}, {"name": "block2"}, {"op": "add", "skip": True}]
    plan = _plan(golden_model, EthosUConfig(name="ethos-u", **schemes.int8(), rules=rules))
    weights = {entry.name for entry in plan.entries if entry.weight is not None}
    assert weights == {"block2.dw", "block2.pw", "head"}
    assert not plan["expand"].quantized
    assert plan["block2.add"].rule == "rules[2] (op: add)"
    assert plan["block1.add"].reason == "left out by the rule"


def test_partial_rules_keep_the_rest(golden_model: nn.Module) -> None:
    rules = [{"name": "head", "weight": "int4"}]
    plan = _plan(golden_model, EthosUConfig(name="ethos-u", **schemes.int8(), rules=rules))
    assert str(plan["head"].weight) == "int4/channel/sym"
    assert str(plan["head"].input) == "int8/tensor/asym/mse"
    assert str(plan["head"].bias) == "int32/channel/sym"


@pytest.mark.parametrize("precedence", ["last_match", "executorch"])
def test_what_matches_nothing_is_an_error(precedence: Any, golden_model: nn.Module) -> None:
    for rule in ({"name": "blok1", "skip": True}, {"type": "Conv3d", "skip": True}):
        config = EthosUConfig(name="ethos-u", **schemes.int8(), rules=[rule], precedence=precedence)
        with pytest.raises(UnmatchedRuleError):
            _plan(golden_model, config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "ethos-u99-1"}, "no Ethos-U is called 'ethos-u99-1': there are ethos-u55-32"),
        ({"input": "int8/dynamic"}, "cannot do dynamic true"),
        ({"input": "int8", "weight": "int8/asym"}, "symmetric false"),
        ({"input": "uint8"}, "uint8 exists only at the model's ends"),
        ({"weight": "int8"}, "Arm quantizes no weight alone"),
        ({"input": "int8", "output": "int16/sym"}, "does not go with input int8"),
        ({"input": "int8/percentile:99"}, "observer percentile"),
        ({"composable": False}, "add precedence: executorch"),
        ({"vela_flags": ["--a b"]}, "cut at blanks"),
        ({"config_arguments": {"bits": 3}}, "takes no such argument.*act_qmin, act_qmax"),
        ({"config_arguments": {"is_qat": True}}, "is_qat: write qat: true instead"),
        ({"config_arguments": {"act_qmin": -129}}, "no code of int8"),
        ({"config_arguments": {"act_qmin": 5, "act_qmax": 5}}, "5 is not below 5"),
        (
            {"input": "int8", "weight": "int4", "config_arguments": {"weight_qmax": 15}},
            "no code of int4",
        ),
        (
            {"precedence": "executorch", "rules": [{"op": "add", "skip": True}]},
            "knows rules with one of name, type",
        ),
    ],
)
def test_refused_before_any_work(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EthosUConfig(name="ethos-u", **fields)


def test_unknown_profiles(golden_model: nn.Module) -> None:
    config = TosaConfig(name="tosa", weight="int8", input="int8", profile="TOSA-9.9+INT")
    with pytest.raises(QuantizationError, match="no TOSA profile is called 'TOSA-9.9"):
        TosaBackend(config).make_plan(golden_model, torch.randn(2, 3, 32, 32))


def test_vgf_and_tosa_quantize(golden_model: nn.Module, golden_inputs: Any) -> None:
    images = torch.from_numpy(golden_inputs["calib"])
    snorm = VgfBackend(VgfConfig(name="vgf", weight="int8", input="int8", snorm=True))
    rows = {row.tensor: row for row in snorm.quantize(golden_model, [images]).encodings()}
    low, high = rows["stem.input"].min, rows["stem.input"].max
    assert low is not None
    assert high is not None
    scale, zero = rows["stem.input"].scale, rows["stem.input"].zero_point
    assert scale is not None
    assert zero is not None
    assert torch.allclose(low, (-127 - zero) * scale)
    tosa = TosaBackend(TosaConfig(name="tosa", weight="int8", input="int8"))
    assert len(tosa.quantize(golden_model, [images]).plan.quantized) == 19


def test_arguments_of_their_own_configurations(golden_model: nn.Module, golden_inputs: Any) -> None:
    from executorch.backends.arm.ethosu import EthosUCompileSpec
    from executorch.backends.arm.quantizer import (
        EthosUQuantizer,
        get_symmetric_quantization_config,
    )

    images = torch.from_numpy(golden_inputs["calib"])
    arguments = {"act_qmin": -100, "act_qmax": 90, "weight_qmin": -63, "weight_qmax": 63}
    config = EthosUConfig(
        name="ethos-u",
        **{**schemes.int8(), "weight": "int8/channel"},
        batch="static",
        config_arguments=arguments,
    )
    quantized = EthosUBackend(config).quantize(golden_model, list(images[:, None]))
    theirs = EthosUQuantizer(EthosUCompileSpec("ethos-u55-128"))
    theirs.set_global(get_symmetric_quantization_config(**arguments))
    with torch.no_grad():
        program = torch.export.export(golden_model, (images[:1],))
        prepared = prepare_pt2e(program.module(check_guards=False), theirs)
        for image in images:
            prepared(image[None])
        converted = convert_pt2e(prepared)
        expected = torch.cat([converted(image[None]) for image in images])
    assert torch.equal(quantized(images), expected)
    weight = next(row for row in quantized.encodings() if row.tensor == "head.weight")
    assert weight.max is not None
    assert weight.scale is not None
    assert torch.equal(weight.max, 63 * weight.scale)


def test_pass_options_reach_the_compiler() -> None:
    from quark_pt2e.backends.devices import compile_spec

    config = EthosUConfig(
        name="ethos-u", passes={"softmax": "stable", "quantize_inf": [-100.0, 100.0]}
    )
    found = compile_spec(config)._get_pass_pipeline_config()
    assert found.softmax.name == "STABLE"
    assert found.quantize_inf.neg_inf == -100.0
