"""Every combination either runs or is refused before any work; none fails in the middle."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

from quark_core.errors import ConfigError

WEIGHTS = [
    None,
    *(
        "/".join(filter(None, parts))
        for parts in itertools.product(
            ("int2", "int8", "uint4", "int16"),
            ("tensor", "channel", "token"),
            ("sym", "asym"),
            ("", "power_of_two"),
            ("", "mse"),
        )
    ),
]
INPUTS = [
    None,
    *(
        "/".join(filter(None, parts))
        for parts in itertools.product(
            ("int8", "uint8"),
            ("tensor", "channel", "token"),
            ("sym", "asym"),
            ("", "power_of_two"),
            ("", "percentile:99.9", "dynamic"),
        )
    ),
]
BIASES = [None, "int16", "int32", "int8"]


def _outcome(model: nn.Module, batches: list[Tensor], fields: dict[str, Any]) -> str:
    try:
        config = BrevitasConfig(name="brevitas", **fields)
    except ConfigError:
        return "refused"
    if config.weight is None and config.input is None and config.bias is None:
        return "refused"  # the host refuses to do nothing
    quantized = BrevitasQuantizer(config).quantize(model, batches)
    with torch.no_grad():
        assert torch.isfinite(quantized(batches[0])).all()
    assert quantized.size_bytes() > 0
    return "accepted"


@pytest.mark.slow
def test_cross_product(tiny: nn.Module, batches: list[Tensor], capsys: Any) -> None:
    counts = {"accepted": 0, "refused": 0}
    # Each weight spec with one input spec and the other way round; all pairs of the rest.
    cases = [{"weight": weight} for weight in WEIGHTS]
    cases += [{"weight": "int8", "input": text} for text in INPUTS]
    for backend, bias, text, correct in itertools.product(
        ("layerwise", "fx"),
        BIASES,
        (None, "int8", "int8/sym", "int8/token/dynamic", "int8/dynamic", "int8/power_of_two"),
        (False, True),
    ):
        cases.append(
            {
                "backend": backend,
                "weight": "int8",
                "input": text,
                "bias": bias,
                "bias_correction": correct,
            }
        )
    for fields in cases:
        try:
            counts[_outcome(tiny, batches, fields)] += 1
        except Exception as error:
            raise AssertionError(f"failed in the middle: {fields}") from error
    with capsys.disabled():
        print(f"\nbrevitas cross product: {counts}, failed in the middle: 0")
    assert counts["accepted"] > 60
    assert counts["refused"] > 60


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"weight": "int8/asym/power_of_two"},
            "brevitas cannot do scale power_of_two for a weight of format int8: accepted are float32",
        ),
        ({"weight": "int8", "input": "int8/channel"}, "cannot do granularity channel for an input"),
        (
            {"weight": "mxfp4"},
            "brevitas cannot do mxfp4_e2m1 for a weight: accepted are int2..int8",
        ),
        (
            {"weight": "int8", "bias": "int32"},
            "bias: Brevitas takes the bias's scale from a static",
        ),
        (
            {"weight": "int8", "input": "int8/dynamic/sym", "bias": "int32"},
            "write input: int8, or leave bias out",
        ),
        ({"input": "int8"}, "weight: Brevitas quantizes inputs and biases beside a weight"),
        (
            {"weight": "int8", "input": "int8/dynamic/sym", "backend": "fx"},
            "input: fx needs static inputs: write backend: layerwise",
        ),
        (
            {
                "weight": "int8",
                "input": "int8",
                "backend": "fx",
                "rules": [{"glob": "*", "skip": True}],
            },
            "rules[0] skips a layer, but fx quantizes activations along the whole graph",
        ),
        (
            {"weight": "int8", "rules": [{"glob": "*", "weight": None, "input": "int8"}]},
            "rules[0].weight: Brevitas quantizes inputs and biases beside a weight",
        ),
        ({"weight": "int8", "backend": "flexml"}, "backend: 'flexml' is not accepted"),
    ],
)
def test_refusals_say_what_would_do(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BrevitasConfig(name="brevitas", **fields)
    assert words in str(caught.value)


def test_plugin_and_configuration_need_neither_torch_nor_brevitas() -> None:
    script = (
        "import sys, quark_brevitas.plugin as p; p.quark_quantizers();"
        "assert not {'torch', 'brevitas', 'pydantic'} & set(sys.modules), sorted(sys.modules);"
        "import quark_brevitas.config;"
        "assert not {'torch', 'brevitas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
