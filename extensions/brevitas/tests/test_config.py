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

from quark_core.errors import ConfigError, QuantizationError

FORMATS = [
    "int2",
    "int8",
    "uint4",
    "int16",
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_e4m3fnuz",
    "fp4_e2m1",
    "fp[1|3|4]",
    "fp[1|1|0]",
    "mxfp8",
    "mxfp6_e2m3{4}",
    "mxint8",
    "nvfp4",
]
GRANULARITIES = ["tensor", "channel", "group:4", "token", "channel:0"]
SYMMETRY = ["", "sym", "asym"]
SCALES = ["", "power_of_two"]
WEIGHTS = ["int8", "uint4/asym", "int4/group:4", "fp8_e4m3", "int8/power_of_two", "mxfp4", None]
INPUTS = [
    "int8",
    "uint8/sym",
    "int8/power_of_two/percentile:99",
    "fp8_e4m3/mse",
    "int8/channel:0/dynamic",
    "int8/token/dynamic/sym",
    "mxint8",
    None,
]
PASSES: list[dict[str, Any]] = [
    {},
    {"algorithm": "gptq"},
    {"algorithm": {"name": "gptq", "engine": "brevitas", "act_order": True}},
    {"algorithm": "gpfq"},
    {"algorithm": "qronos"},
    {"algorithm": {"name": "learned_round", "iterations": 2}},
    {"magr": {"steps": 2}},
    {"activation_equalization": {"alpha": 0.5}},
    {"activation_equalization": {"mode": "fx"}},
    {"channel_splitting": 0.2},
    {"equalize_iterations": 2, "bias_correction": True},
    {"merge_bn": False, "calibrate_bn": True},
    {"hqo": True},
    {"hqo": True, "round_zero_points": False},
    {"pad_groups": True},
]


NORMS = {"merge_layernorm": True, "layernorm_to_rmsnorm": True}
LEARNED_BLOCKS = {
    "name": "learned_round",
    "function": "identity",
    "iterations": 2,
    "blocks": "feed",
    "learn_scale": True,
}
OPTIONS: list[dict[str, Any]] = [
    *PASSES,
    {"merge_layernorm": True},
    {"layernorm_to_rmsnorm": True},
    NORMS,
    {"rotation": {"mode": "layerwise"}},
    {"rotation": {"mode": "layerwise", "block_size": 4}},
    {"rotation": {"mode": "layerwise", "matrix": "orthogonal"}},
    {**NORMS, "rotation": {}},
    {"merge_layernorm": True, "rotation": {}},
    {**NORMS, "rotation": {"mode": "fx", "matrix": "orthogonal"}},
    {**NORMS, "rotation": {"sdpa_regions": True, "online": True}},
    {**NORMS, "rotation": {"mode": "fx", "block_size": 4, "permute": "zigzag"}},
    {**NORMS, "rotation": {"block_size": 4, "permute": "massdiff"}},
    {"attention": {}},
    {"attention": {"mode": "fx", "tensors": "kv", "spec": "fp8_e4m3"}},
    {"attention": {"tensors": "qkv", "spec": "int8/asym"}},
    {"attention": {"spec": "int8/dynamic/sym"}},
    {"attention": {"spec": "int8/token/dynamic/sym"}},
    {"unsigned_relu": False},
    {"unscaled_inputs": True},
    {"equalize_iterations": 2, "equalize_scale": "range"},
    {"equalize_iterations": 2, "equalize_bias_shrinkage": 2.0},
    {"equalize_bias_shrinkage": 2.0},
    {"awq": {"steps": 2}},
    {"awq": {"steps": 2, "mode": "fused"}},
    {"activation_equalization": {"mode": "fused"}},
    {"low_rank": {"rank": 2}},
    {"low_rank": {"rank": 2, "iterations": 3}},
    {"narrow_range": True},
    {"scale_rounding": "floor"},
    {"bias": "int32"},
    {"rules": [{"io": "output", "weight": "int8"}]},
    {"algorithm": {"name": "gptq", "quantized_inputs": True, "act_order": True}},
    {"algorithm": {"name": "gptq", "accumulator": {"bits": 16}}},
    {"algorithm": {"name": "gptq", "accumulator": {"bits": 20, "tile": 4}, "engine": "brevitas"}},
    {"algorithm": {"name": "gpfq", "accumulator": {"bits": 20, "tile": 4}}},
    {"algorithm": {"name": "gpfq", "engine": "brevitas"}},
    {"algorithm": {"name": "qronos", "engine": "brevitas"}},
    {"algorithm": {"name": "learned_round", "iterations": 2, "learn_scale": True}},
    {"algorithm": {"name": "learned_round", "iterations": 2, "blocks": "feed"}},
    {"algorithm": LEARNED_BLOCKS},
]
CONTEXTS: list[dict[str, Any]] = [
    {"backend": backend, "weight": weight, "input": text}
    for weight, text, backend in (
        ("int4/asym", None, "layerwise"),
        ("int8/channel", "int8", "layerwise"),
        ("int8/channel", "int8/sym", "fx"),
        ("mxfp4", "mxfp8", "layerwise"),
        ("fp8_e4m3", "fp8_e4m3", "layerwise"),
        ("int8/group:4", "int8/token/dynamic/sym", "layerwise"),
        (None, None, "layerwise"),
    )
]


class Small(nn.Module):
    """Little to compute, with what makes cases differ: few channels, an addition, a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 2)
        self.bn = nn.BatchNorm2d(5)
        self.relu = nn.ReLU()
        self.side = nn.Conv2d(5, 5, 1, bias=False)
        self.fc = nn.Linear(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(self.conv(x)))
        out: Tensor = self.fc(torch.flatten(self.side(y) + y, 1))
        return out


class Mixed(nn.Module):
    """A convolution, then attention and layers between LayerNorms: a place for every option."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 2), nn.BatchNorm2d(8), nn.ReLU()
        self.embed = nn.Linear(8, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.feed = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.norm3, self.head = nn.LayerNorm(8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(self.relu(self.bn(self.conv(x))).flatten(2).transpose(1, 2))
        y = self.norm1(x)
        y = nn.functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        x = x + self.o(y)
        x = x + self.feed(self.norm2(x))
        out: Tensor = self.head(self.norm3(x))
        return out


def _spec(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _cases(part: str) -> list[dict[str, Any]]:
    """All values of one spec beside a plain rest, or all pairs of typical specs and options."""
    if part == "pairs":
        return [
            {"backend": backend, "weight": weight, "input": text, "bias": bias, **options}
            for backend, weight, text, bias, options in itertools.product(
                ("layerwise", "fx"),
                WEIGHTS,
                INPUTS,
                (None, "int16", "int8"),
                ({}, {"bias_correction": True}, {"scale_rounding": "midmax"}),
            )
        ]
    if part == "passes":
        return [
            {"backend": backend, "weight": weight, "input": text, **first, **second}
            for backend, weight, text, (first, second) in itertools.product(
                ("layerwise", "fx"),
                ("int4/asym", "mxfp4"),
                (None, "int8", "mxfp8"),
                itertools.combinations(PASSES, 2),
            )
            if backend == "layerwise" or text == "int8"
        ]
    if part == "options":
        # A sample: each option alone in every second context, and every eighth pair in one.
        alone = list(itertools.product(CONTEXTS, OPTIONS))[::2]
        pairs = list(itertools.combinations(OPTIONS, 2))[::8]
        return [{**context, **option} for context, option in alone] + [
            {**context, **first, **second}
            for (first, second), context in zip(pairs, itertools.cycle(CONTEXTS), strict=False)
        ]
    specs = itertools.product([part], GRANULARITIES, SYMMETRY, SCALES)
    modes = ("", "mse", "percentile:99", "dynamic", "dynamic/mse")
    cases: list[dict[str, Any]] = []
    for spec in specs:
        cases += [{"weight": _spec(*spec, observer)} for observer in ("", "mse", "entropy")]
        cases += [
            {"weight": "int8", "input": _spec(*spec, mode), "backend": backend}
            for mode in modes
            for backend in ("layerwise", "fx")
        ]
    return cases


def _outcome(model: nn.Module, batches: list[Tensor], fields: dict[str, Any]) -> str:
    try:
        quantizer = BrevitasQuantizer(BrevitasConfig(name="brevitas", **fields))
        plan = quantizer.make_plan(model, batches[0])
    except ConfigError:
        return "refused"
    except QuantizationError as error:
        if error.__cause__ is not None:
            raise  # an error of Brevitas's own is no refusal
        return "refused"
    if not plan.quantized:
        return "refused"  # the host refuses to do nothing
    quantized = quantizer.quantize(model, batches)
    with torch.no_grad():
        assert torch.isfinite(quantized(batches[0])).all()
    assert quantized.size_bytes() > 0
    return "accepted"


@pytest.mark.slow
@pytest.mark.parametrize("part", [*FORMATS, "pairs", "passes", "options"])
def test_cross_product(part: str, capsys: Any) -> None:
    torch.manual_seed(0)
    model = (Mixed() if part == "options" else Small()).eval()
    batches = [torch.randn(3, 3, 3, 3) for _ in range(2)]
    counts = {"accepted": 0, "refused": 0}
    for fields in _cases(part):
        try:
            counts[_outcome(model, batches, fields)] += 1
        except Exception as error:
            raise AssertionError(f"failed in the middle: {fields}") from error
    with capsys.disabled():
        print(f"\nbrevitas cross product, {part}: {counts}, failed in the middle: 0")
    assert counts["refused"] > 10
    assert counts["accepted"] > 2 or part == "nvfp4"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"weight": "int8/asym/power_of_two"},
            "brevitas cannot do scale power_of_two for a weight of format int8: accepted are float32",
        ),
        ({"weight": "int8", "input": "int8/channel"}, "cannot do granularity channel for an input"),
        (
            {"weight": "nvfp4"},
            "brevitas cannot do nvfp4 for a weight: accepted are int2..int16",
        ),
        (
            {"weight": "int8", "input": "int8/channel/dynamic"},
            "write tensor, or channel:0 for one scale a sample",
        ),
        (
            {"weight": "int8/channel:1"},
            "chooses the axis of a weight's scales itself: write channel",
        ),
        (
            {"weight": "fp[1|0|3]"},
            "fp[1|0|3] has no exponent bits, which Brevitas needs: write int4",
        ),
        ({"weight": "fp[1|8|7]"}, "outside float32's 2^-126 to 2^127: use fewer exponent bits"),
        ({"weight": "fp8_e4m3", "hqo": True}, "hqo is for integers with float32 scales"),
        ({"weight": "int4/group:4", "hqo": True}, "write int4/group:4/asym, or hqo: false"),
        (
            {"weight": "int8", "scale_rounding": "floor"},
            "scale_rounding: only power-of-two scales are rounded",
        ),
        ({"weight": "fp8_e4m3", "narrow_range": True}, "only symmetric integer weights have"),
        (
            {"weight": "fp8_e4m3", "input": "int8", "bias": "int32"},
            "takes the bias's scale from an integer weight's",
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
        ({"weight": "int8", "backend": "flexml"}, "backend: 'flexml' is not accepted: it is fx"),
        ({"weight": "int8", "backend": "eager"}, "write layerwise, which takes a model as it is"),
        ({"weight": "int8", "backend": "fy"}, "backend: 'fy' is not accepted"),
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


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ("awq", "write awq"),
        ({"name": "svdquant", "rank": 32}, "write low_rank"),
        ("gpfa2q", "accumulator"),
        ("hqo", "hqo: true"),
    ],
)
def test_what_is_no_algorithm_here_is_answered_with_what_to_write(
    algorithm: object, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        BrevitasConfig(name="brevitas", weight="int4", algorithm=algorithm)
