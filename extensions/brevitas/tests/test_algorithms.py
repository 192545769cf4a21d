"""Algorithms that choose codes from data: exact grids, better outputs, nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quark_brevitas.algorithms import walk
from quark_brevitas.algorithms.columns import input_columns
from quark_brevitas.algorithms.grid import Grid
from quark_brevitas.algorithms.walk import Walk
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.quantizer import BrevitasQuantizer
from torch import Tensor, nn

from quark_core.batch import Batch
from quark_core.errors import ConfigError, QuantizationError


def _quantizer(**fields: Any) -> BrevitasQuantizer:
    return BrevitasQuantizer(BrevitasConfig(**{"name": "brevitas", "weight": "int3", **fields}))


class Blocks(nn.Module):
    """A stack of equal blocks whose inputs are far from independent."""

    def __init__(self, width: int = 24, depth: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.last = nn.Linear(width, 5)

    def forward(self, x: Tensor, *, shift: float = 0.0) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, shift=shift)
        out: Tensor = self.last(x)
        return out


class Block(nn.Module):
    """Two layers share an input, a third follows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left = nn.Linear(width, width)
        self.right = nn.Linear(width, width)
        self.join = nn.Linear(width, width)

    def forward(self, x: Tensor, *, shift: float) -> Tensor:
        out: Tensor = x + self.join(torch.relu(self.left(x)) * torch.sigmoid(self.right(x))) + shift
        return out


@pytest.fixture
def blocks() -> nn.Module:
    torch.manual_seed(3)
    return Blocks().eval()


@pytest.fixture
def correlated() -> list[Batch]:
    torch.manual_seed(4)
    mixing = torch.randn(6, 24)
    return [
        Batch((torch.randn(4, 8, 6) @ mixing + 0.1 * torch.randn(4, 8, 24),), {"shift": 0.1})
        for _ in range(4)
    ]


def _error(model: nn.Module, quantized: Any, data: list[Batch]) -> float:
    with torch.no_grad():
        wanted = torch.cat([batch.run(model) for batch in data])
        found = torch.cat([batch.run(quantized) for batch in data])
    return float((wanted - found).square().sum() / wanted.square().sum())


WEIGHTS = [
    "int3",
    "int4/tensor",
    "uint4/asym",
    "int4/group:8/asym",
    "int4/group:8",
    "int4/group:8/power_of_two",
    "fp8_e4m3",
    "fp[1|2|1]/group:8",
    "fp8_e5m2fnuz/tensor",
    "mxfp4",
    "mxfp6_e2m3{5}",
    "mxint8",
]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_grid_rounds_as_brevitas_does(blocks: nn.Module, weight: str) -> None:
    quantized = _quantizer(weight=weight).quantize(blocks)
    entry = quantized.plan["blocks.0.left"]
    layer: Any = quantized.layer("blocks.0.left")
    assert entry.weight is not None
    with torch.no_grad():
        grid = Grid.of(layer, entry.weight)
        layer.weight.mul_(1.3)  # some values now lie outside the range the scales were made for
        expected = layer.quant_weight().value
        order = torch.randperm(24)
        rounder = grid.rounder(slice(0, 24), order)
        columns = [rounder(layer.weight[:, int(at)].clone(), i) for i, at in enumerate(order)]
        assert torch.equal(torch.stack(columns, 1), expected[:, order])
        counts, steps = grid.units(layer.weight)
        torch.testing.assert_close(grid.clamp(counts.round(), steps), expected)


ALGORITHMS: list[Any] = [
    "gptq",
    {"name": "gptq", "act_order": True, "quantized_inputs": True},
    "gpfq",
    {"name": "gpfq", "act_order": True},
    "qronos",
    {"name": "learned_round", "iterations": 400, "learning_rate": 0.01},
    {"name": "learned_round", "iterations": 400, "learning_rate": 0.01, "function": "sigmoid"},
    {"name": "learned_round", "iterations": 800, "learning_rate": 0.005, "function": "identity"},
    {"name": "learned_round", "iterations": 400, "learning_rate": 0.01, "blocks": "blocks"},
]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("weight", ["int3/asym", "mxfp4"])
def test_outputs_are_closer_than_with_nearest_codes(
    blocks: nn.Module, correlated: list[Batch], algorithm: Any, weight: str
) -> None:
    fields = {"weight": weight, "input": "int8/percentile:99.9"}
    nearest = _quantizer(**fields).quantize(blocks, correlated)
    chosen = _quantizer(**fields, algorithm=algorithm).quantize(blocks, correlated)
    assert _error(blocks, chosen, correlated) < 0.8 * _error(blocks, nearest, correlated)
    within = "blocks" if isinstance(algorithm, dict) and "blocks" in algorithm else ""
    for entry in chosen.plan.quantized:
        if entry.name.startswith(within):
            layer: Any = chosen.layer(entry.name)
            # Already on the grid.
            torch.testing.assert_close(layer.weight, layer.quant_weight().value)


@pytest.mark.parametrize("name", ["gptq", "gpfq", "qronos"])
def test_fast_engine_is_no_worse_than_brevitas_own(name: str) -> None:
    errors = {"fast": 0.0, "brevitas": 0.0}
    for seed in range(3):
        torch.manual_seed(seed)
        model, mixing = Blocks().eval(), torch.randn(6, 24)
        data = [
            Batch((torch.randn(4, 8, 6) @ mixing + 0.1 * torch.randn(4, 8, 24),)) for _ in range(4)
        ]
        for engine in errors:
            options = {"name": name, "engine": engine}
            quantizer = _quantizer(weight="int4/group:8/asym", algorithm=options)
            errors[engine] += _error(model, quantizer.quantize(model, data), data)
    assert errors["fast"] < 1.1 * errors["brevitas"]


def test_convolutions_are_rounded_too(tiny: nn.Module, batches: list[Tensor]) -> None:
    data = [Batch((batch,)) for batch in batches]
    rules = [{"op": "conv_transpose2d", "skip": True}, {"op": "conv_transpose1d", "skip": True}]
    nearest = _quantizer(rules=rules).quantize(tiny, batches)
    chosen = _quantizer(rules=rules, algorithm="gptq").quantize(tiny, batches)
    assert _error(tiny, chosen, data) < 0.8 * _error(tiny, nearest, data)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4, bias=False),
        nn.Conv2d(6, 4, 3, padding=1, stride=2, bias=False),
        nn.Conv2d(6, 4, (1, 3), padding="same", groups=2, dilation=(1, 2), bias=False),
        nn.Conv2d(6, 6, 3, groups=6, padding=2, padding_mode="reflect", bias=False),
        nn.Conv1d(6, 4, 3, padding=1, bias=False),
        nn.Conv3d(6, 4, (3, 2, 3), padding=1, stride=(1, 2, 1), groups=2, dilation=2, bias=False),
    ],
)
def test_columns_times_rows_is_what_the_layer_computes(layer: Any) -> None:
    shapes = {nn.Linear: (2, 7, 6), nn.Conv1d: (2, 6, 9), nn.Conv2d: (2, 6, 8, 9)}
    shapes[nn.Conv3d] = (2, 6, 7, 5, 6)
    x = torch.randn(shapes[type(layer)])
    groups = getattr(layer, "groups", 1)
    rows = layer.weight.reshape(groups, layer.weight.shape[0] // groups, -1)
    found = input_columns(layer, x) @ rows.transpose(1, 2)  # [groups, positions, rows]
    wanted = layer(x)
    wanted = wanted if isinstance(layer, nn.Linear) else wanted.movedim(1, -1)
    flat = found.permute(1, 0, 2).reshape(-1, layer.weight.shape[0])
    torch.testing.assert_close(
        flat, wanted.reshape(-1, layer.weight.shape[0]), rtol=1e-4, atol=1e-5
    )


def test_steps_follow_execution_and_layers_run_once(
    blocks: nn.Module, correlated: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = {name: m for name, m in blocks.named_modules() if isinstance(m, nn.Linear)}
    walk = Walk(blocks, layers, dict.fromkeys(layers, ""), correlated[0])
    assert [step.layers for step in walk.steps][:4] == [
        ["first"],
        ["blocks.0.left", "blocks.0.right"],
        ["blocks.0.join"],
        ["blocks.1.left", "blocks.1.right"],
    ]
    ran: dict[str, int] = dict.fromkeys(layers, 0)
    forward = nn.Linear.forward

    def counted(layer: nn.Linear, x: Tensor) -> Tensor:
        ran[next(name for name, module in layers.items() if module is layer)] += 1
        return forward(layer, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    inputs: dict[str, Tensor] = {}
    for step in walk.steps:
        for index, batch in enumerate(correlated):
            walk.run(
                step, batch, index, "only", lambda x, s=step: inputs.__setitem__(s.layers[0], x)
            )
        walk.finish(step)
    assert ran == {**dict.fromkeys(layers, len(correlated)), "last": 0}
    monkeypatch.undo()
    expected: dict[str, Tensor] = {}
    for name in inputs:
        layers[name].register_forward_pre_hook(
            lambda _m, args, name=name: expected.__setitem__(name, args[0])
        )
    correlated[-1].run(blocks)
    for name, received in inputs.items():
        torch.testing.assert_close(received, expected[name])


class Residual(nn.Module):
    """Adds up outside of its blocks, and changes what a layer returned in place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(24, 24), nn.ReLU(inplace=True), nn.Linear(24, 24))
            for _ in range(3)
        )

    def forward(self, x: Tensor, *, shift: float = 0.0) -> Tensor:
        for block in self.blocks:
            x = x + block(x) + shift
        return x


class Skipping(Blocks):
    """What the first block returns is used again after the second."""

    def forward(self, x: Tensor, *, shift: float = 0.0) -> Tensor:
        first = self.blocks[0](self.first(x), shift=shift)
        out: Tensor = self.blocks[2](self.blocks[1](first, shift=shift), shift=shift)
        return self.last(out + first)  # type: ignore[no-any-return]


def test_layers_see_what_they_see_in_the_model(correlated: list[Batch]) -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    walk = Walk(model, layers, dict.fromkeys(layers, ""), correlated[0])
    expected: dict[str, Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda _m, args, name=name: expected.update({name: args[0].clone()})
        )
    for step in walk.steps:
        (name,) = step.layers
        for index, batch in enumerate(correlated):
            found: list[Tensor] = []
            walk.run(step, batch, index, "only", found.append)
            expected.clear()
            batch.run(model)
            assert torch.equal(found[0], expected[name])
        walk.finish(step)


@pytest.mark.parametrize("algorithm", ["gptq", "qronos"])
def test_outputs_of_blocks_that_are_used_twice_are_not_made_up(
    correlated: list[Batch], algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Skipping().eval()
    found = _quantizer(algorithm=algorithm).quantize(model, correlated)
    monkeypatch.setattr(walk, "_stack", lambda *_: [])
    whole = _quantizer(algorithm=algorithm).quantize(model, correlated)
    for entry in found.plan.quantized:
        layers: list[Any] = [quantized.layer(entry.name) for quantized in (found, whole)]
        assert torch.equal(layers[0].weight, layers[1].weight)


@pytest.mark.parametrize("algorithm", ["gptq", "gpfq", "qronos"])
def test_inputs_may_be_tiny(algorithm: str) -> None:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(24, 8, bias=False)).eval()
    data = torch.randn(64, 24) @ torch.randn(24, 24)
    codes = []
    for size in (1.0, 2.0**-68):
        quantized = _quantizer(algorithm=algorithm).quantize(model, [data * size])
        layer: Any = quantized.layer("0")
        codes.append(layer.weight)
    different = (codes[0] != codes[1]).float().mean()
    assert different < 0.05  # float32 has few digits left there


def test_values_that_are_not_finite_are_named(blocks: nn.Module, correlated: list[Batch]) -> None:
    with torch.no_grad():
        blocks.get_submodule("blocks.1.left").get_parameter("bias")[0] = torch.inf
    with pytest.raises(QuantizationError, match=r"layer 'blocks.1.join'.*are not finite"):
        _quantizer(algorithm="gptq").quantize(blocks, correlated)


def test_switching_a_layer_off_gives_its_float_weight(
    blocks: nn.Module, correlated: list[Batch], tmp_path: Any
) -> None:
    quantizer = _quantizer(algorithm="gptq")
    quantized = quantizer.quantize(blocks, correlated)
    quantized.save(tmp_path)
    for model in (quantized, quantizer.restore(blocks, tmp_path)):
        for entry in model.plan.quantized:
            model.set_enabled(entry.name, False)
        assert _error(blocks, model, correlated) < 1e-10
        for entry in model.plan.quantized:
            model.set_enabled(entry.name, True)
        assert _error(blocks, model, correlated) > 1e-6


def test_saved_equalized_models_have_no_float_weights(
    blocks: nn.Module, correlated: list[Batch], tmp_path: Any
) -> None:
    quantizer = _quantizer(activation_equalization={"alpha": 0.3})
    quantizer.quantize(blocks, correlated).save(tmp_path)
    with pytest.raises(QuantizationError, match="does not keep the float weights"):
        quantizer.restore(blocks, tmp_path).set_enabled("first", False)


def test_equalization_helps_where_inputs_have_large_channels(
    blocks: nn.Module, correlated: list[Batch]
) -> None:
    scale = torch.ones(24)
    scale[::6] = 40
    data = [batch.map(lambda x: x * scale) for batch in correlated]
    with torch.no_grad():
        blocks.get_submodule("first").weight /= scale  # type: ignore[operator, union-attr]
    fields = {"weight": "int8", "input": "int8/token/dynamic/sym"}
    plain = _quantizer(**fields).quantize(blocks, data)
    smooth = _quantizer(**fields, activation_equalization={"alpha": 0.5}).quantize(blocks, data)
    assert _error(blocks, smooth, data) < 0.3 * _error(blocks, plain, data)
    assert smooth.layer("first") is not None
    assert {e.tensor for e in smooth.encodings()} == {e.tensor for e in plain.encodings()}


def test_magr_shrinks_weights_but_hardly_changes_outputs(
    blocks: nn.Module, correlated: list[Batch]
) -> None:
    fields = {"weight": "int16"}
    before = _quantizer(**fields).quantize(blocks, correlated)
    after = _quantizer(**fields, magr={"alpha": 0.001, "steps": 100}).quantize(blocks, correlated)
    assert _error(blocks, after, correlated) < 0.05
    for name in ("first", "blocks.1.left"):
        one: Any = before.layer(name)
        other: Any = after.layer(name)
        assert other.weight.abs().amax(1).mean() < 0.95 * one.weight.abs().amax(1).mean()


def test_mx_integers_have_the_scale_of_the_specification(blocks: nn.Module) -> None:
    quantized = _quantizer(weight="mxint8").quantize(blocks)
    encoding = quantized.encodings()[0]
    layer: Any = quantized.layer("first")
    weight = nn.functional.pad(layer.weight, (0, 8)).reshape(24, 1, 32)
    shared = torch.exp2(weight.abs().amax(2).log2().floor())
    assert encoding.scale is not None
    assert torch.equal(encoding.scale, shared)
    values = (weight / shared[..., None] * 64).round().clamp(-127, 127) / 64 * shared[..., None]
    found = layer.quant_weight().value
    assert torch.equal(found, values.reshape(24, 32)[:, :24])
    noise = (found - layer.weight).square().sum()
    assert 10 * torch.log10(layer.weight.square().sum() / noise) > 44


def test_passes_are_named_by_layer_and_counted(blocks: nn.Module, correlated: list[Batch]) -> None:
    seen: list[tuple[str, int]] = []
    _quantizer(algorithm="gptq").quantize(
        blocks, correlated, progress=lambda task, done, total: seen.append((task, done))
    )
    names = list(dict.fromkeys(task for task, _ in seen))
    assert names == [f"gptq {count}/8" for count in range(1, 9)]
    assert ("gptq 3/8", 4) in seen


def test_an_interrupted_algorithm_leaves_the_float_model_alone(
    blocks: nn.Module, correlated: list[Batch]
) -> None:
    before = {name: tensor.clone() for name, tensor in blocks.state_dict().items()}

    def interrupt(task: str, done: int, total: int | None) -> None:
        if task == "gptq 4/8":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _quantizer(algorithm="gptq").quantize(blocks, correlated, progress=interrupt)
    assert all(torch.equal(before[name], tensor) for name, tensor in blocks.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in blocks.modules())
    with torch.no_grad():
        assert torch.isfinite(correlated[0].run(blocks)).all()


def test_magr_is_the_first_to_need_brevitas() -> None:
    script = (
        "import torch; from torch import nn\n"
        "from quark_brevitas.config import BrevitasConfig\n"
        "from quark_brevitas.quantizer import BrevitasQuantizer\n"
        "config = BrevitasConfig(name='brevitas', weight='int4', magr={'steps': 2})\n"
        "BrevitasQuantizer(config).quantize(nn.Sequential(nn.Linear(4, 4)), [torch.ones(2, 4)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("weight", ["int3/asym", "int4/group:8/asym", "int3"])
@pytest.mark.parametrize("name", ["gpfq", "qronos"])
def test_algorithms_of_two_streams_help_without_quantized_inputs(name: str, weight: str) -> None:
    errors = {None: 0.0, name: 0.0}
    for seed in range(4):
        torch.manual_seed(seed)
        model, mixing = Blocks().eval(), torch.randn(6, 24)
        data = [Batch((torch.randn(4, 8, 6) @ mixing + 0.1 * torch.randn(4, 8, 24),))] * 4
        for algorithm in errors:
            quantizer = _quantizer(weight=weight, algorithm=algorithm)
            errors[algorithm] += _error(model, quantizer.quantize(model, data), data)
    assert errors[name] < 0.7 * errors[None]


LEARNED = {"name": "learned_round", "learning_rate": 0.01, "scale_learning_rate": 3e-3}


@pytest.mark.parametrize("more", [{}, {"blocks": "blocks"}])
def test_learned_scales_bring_more(
    blocks: nn.Module, correlated: list[Batch], more: dict[str, Any]
) -> None:
    errors = {}
    for learn_scale in (False, True):
        options = {**LEARNED, "iterations": 300, "learn_scale": learn_scale, **more}
        quantizer = _quantizer(weight="int3/tensor", input="int8", algorithm=options)
        errors[learn_scale] = _error(blocks, quantizer.quantize(blocks, correlated), correlated)
    assert errors[True] < errors[False]


@pytest.mark.parametrize("more", [{}, {"blocks": "blocks"}])
@pytest.mark.parametrize("weight", ["int3", "int3/tensor", "int3/group:8", "fp4_e2m1"])
def test_learned_scales_are_the_models_own(
    blocks: nn.Module, correlated: list[Batch], weight: str, more: dict[str, Any], tmp_path: Path
) -> None:
    options = {**LEARNED, "iterations": 30, "learn_scale": True, **more}
    fields = {"weight": weight, "input": "int8"}
    plain = _quantizer(**fields).quantize(blocks, correlated)
    quantizer = _quantizer(**fields, algorithm=options)
    learned = quantizer.quantize(blocks, correlated)
    scales = {e.tensor: e.scale for e in plain.encodings() if e.role == "weight"}
    for encoding in learned.encodings():
        if encoding.role == "weight" and encoding.layer.startswith("blocks"):
            assert encoding.scale is not None
            assert not torch.equal(encoding.scale, scales[encoding.tensor])
            layer: Any = learned.layer(encoding.layer)
            torch.testing.assert_close(layer.weight, layer.quant_weight().value)
    learned.save(tmp_path)
    loaded = quantizer.restore(blocks, tmp_path)
    assert _error(blocks, loaded, correlated) == _error(blocks, learned, correlated)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"algorithm": {"blocks": "blocks"}, "backend": "fx"}, "backend: layerwise"),
        ({"algorithm": {"learn_scale": True}, "weight": "int4/asym"}, "write sym"),
        ({"algorithm": {"learn_scale": True}, "weight": "mxfp4"}, "float32 scales"),
        ({"algorithm": {"learn_scale": True}, "weight": "int4", "hqo": True}, "hqo fixes scales"),
    ],
)
def test_learning_that_cannot_be_is_refused(fields: dict[str, Any], text: str) -> None:
    algorithm = {"name": "learned_round", **fields.pop("algorithm")}
    with pytest.raises(ConfigError, match=text):
        _quantizer(**{"weight": "int4", **fields}, algorithm=algorithm)


def test_layers_of_a_block_that_no_sample_calls_keep_nearest_codes(
    blocks: nn.Module, correlated: list[Batch]
) -> None:
    blocks.get_submodule("blocks.0").add_module("expert", nn.Linear(24, 24))
    options = {"name": "learned_round", "iterations": 20, "blocks": "blocks"}
    quantized = _quantizer(algorithm=options).quantize(blocks, correlated)
    nearest = _quantizer().quantize(blocks, correlated)
    layers: list[Any] = [model.layer("blocks.0.expert") for model in (quantized, nearest)]
    assert torch.equal(layers[0].quant_weight().value, layers[1].quant_weight().value)


def test_blocks_are_named(blocks: nn.Module) -> None:
    def plan(name: str) -> None:
        options = {"name": "learned_round", "blocks": name}
        _quantizer(weight="int4", algorithm=options).plan(blocks)

    plan("blocks")
    with pytest.raises(QuantizationError, match="no such module.*blocks"):
        plan("layers")
    with pytest.raises(QuantizationError, match="no layer in these blocks"):
        plan("blocks.0.left")
