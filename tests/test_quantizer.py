"""What the host does around every backend, shown on one written for these tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quark_core import Encoding, ModelQuantizer, Plan, PlanEntry, QuantizationConfig, QuantizedModel
from quark_core.batch import Batch, as_batch, main_output
from quark_core.errors import DataError, QuantizationError, UnmatchedRuleError
from quark_core.quantized import packed_sizes
from quark_core.selection import select
from quark_core.spec import TensorSpec
from quark_core.targets import module_targets


class Rounded(QuantizedModel):
    """Weights rounded to multiples of a scale."""

    def __init__(self, module: nn.Module, plan: Plan, format: str = "int8") -> None:
        super().__init__(module, plan)
        self.format = format

    def encodings(self) -> Sequence[Encoding]:
        one = torch.ones(())
        return [
            Encoding(f"{e.name}.weight", e.name, "weight", self.format, "tensor", scale=one)
            for e in self.plan.quantized
        ]


class Backend(ModelQuantizer[QuantizationConfig]):
    """Rounds weights to sixteenths; its flaws are switched on one by one."""

    flaw = ""
    calibrated = 0
    seen: list[Any] = []  # noqa: RUF012

    def plan(self, model: nn.Module, example: Batch | None = None) -> Plan:
        found = module_targets(model, {nn.Linear: "linear", nn.Embedding: "embedding"})
        selection = select([target for target, _ in found], self.config)
        entries = [
            PlanEntry(t.name, "Linear", t.op, weight=selection.decisions[t.name].specs["weight"])
            for t, _ in found
        ]
        if self.flaw == "plan":
            raise ZeroDivisionError("one by zero")
        return Plan(tuple(entries), self.config.input is not None, (), selection.unmatched)

    def prepare(self, model: nn.Module, plan: Plan, example: Batch | None = None) -> nn.Module:
        self.seen = []
        self.random = torch.rand(())
        return model

    def calibrate(self, prepared: nn.Module, batch: Batch) -> None:
        self.seen.append(batch)
        if self.flaw == "calibrate":
            raise KeyError("no such layer")
        super().calibrate(prepared, batch)

    def convert(self, prepared: nn.Module) -> QuantizedModel:
        plan = self.plan(prepared)
        for entry in plan.quantized:
            weight = prepared.get_submodule(entry.name).get_parameter("weight")
            weight.copy_((weight * 16).round() / 16)
            if self.flaw == "nan":
                weight[0] = torch.nan
        if self.flaw == "nan output":
            prepared.get_submodule("last").register_forward_hook(
                lambda *_: torch.full((1, 2), torch.nan)
            )
        if self.flaw == "shape":
            prepared.register_forward_hook(lambda _m, _a, out: out[:, :1])
        if self.flaw == "dtype":
            prepared.register_forward_hook(lambda _m, _a, out: out.double())
        return Rounded(prepared, plan, "int4" if self.flaw == "format" else "int8")


def _backend(flaw: str = "", **fields: Any) -> Backend:
    config = QuantizationConfig(**{"name": "demo", "weight": "int8", **fields})
    backend = Backend(config)
    backend.flaw = flaw
    return backend


@pytest.fixture
def model() -> nn.Module:
    """Two linear layers."""
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("first", nn.Linear(4, 3))
    net.add_module("last", nn.Linear(3, 2))
    return net


BATCHES = [torch.randn(5, 4) for _ in range(4)]


def test_the_float_model_is_left_alone(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantized = _backend().quantize(model, BATCHES)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not torch.equal(quantized.module.get_parameter("first.weight"), before["first.weight"])
    assert torch.equal(quantized(BATCHES[0]), quantized.module(BATCHES[0]))


def test_in_place_changes_the_model_itself(model: nn.Module) -> None:
    assert _backend().quantize(model, BATCHES, inplace=True).module is model


@pytest.mark.parametrize("flaw", ["", "plan", "calibrate", "shape"])
def test_everything_is_put_back(model: nn.Module, flaw: str) -> None:
    model.train()
    model.get_submodule("last").eval()
    state = torch.get_rng_state()
    try:
        _backend(flaw, input="int8").quantize(model, BATCHES)
    except QuantizationError:
        assert flaw
    assert model.training
    assert model.get_submodule("first").training
    assert not model.get_submodule("last").training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_is_fixed(model: nn.Module) -> None:
    drawn = []
    for seed in (3, 3, 4):
        backend = _backend(seed=seed)
        backend.quantize(model, BATCHES)
        drawn.append(float(backend.random))
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("flaw", "words"),
    [
        ("plan", "backend demo: the backend failed in plan: ZeroDivisionError (one by zero)"),
        ("calibrate", "the backend failed in calibrate: KeyError ('no such layer')"),
        ("format", "tensor 'first.weight': the plan says int8, the result has int4"),
        ("nan", "tensor 'first.weight': the quantized tensor holds NaN"),
        ("nan output", "layer 'last': the quantized model returns NaN"),
        ("shape", "the quantized model returns [1, 1] float32, the float model [1, 2] float32"),
        ("dtype", "the quantized model returns [1, 2] float64, the float model [1, 2] float32"),
    ],
)
def test_what_a_backend_does_wrong_is_said(model: nn.Module, flaw: str, words: str) -> None:
    with pytest.raises(QuantizationError) as caught:
        _backend(flaw, input="int8").quantize(model, BATCHES)
    assert words in str(caught.value)


def test_left_out_tensor_is_noticed(model: nn.Module) -> None:
    backend = _backend()
    backend.convert = lambda prepared: Rounded(prepared, backend.plan(prepared))  # type: ignore[method-assign]
    whole = Rounded.encodings
    try:
        Rounded.encodings = lambda self: whole(self)[:1]  # type: ignore[method-assign]
        with pytest.raises(
            QuantizationError, match="'last.weight': the plan says int8, the result is not"
        ):
            backend.quantize(model, BATCHES)
    finally:
        Rounded.encodings = whole  # type: ignore[method-assign]


def test_nothing_to_do_is_an_error(model: nn.Module) -> None:
    with pytest.raises(QuantizationError, match="nothing would be quantized"):
        _backend(weight=None).quantize(model)


def test_unmatched_rule_is_an_error(model: nn.Module) -> None:
    with pytest.raises(UnmatchedRuleError, match="nearest: first"):
        _backend(rules=[{"name": "frist", "skip": True}]).quantize(model)


@pytest.mark.parametrize("data", [None, [], iter(())])
def test_missing_calibration_is_an_error(model: nn.Module, data: Any) -> None:
    with pytest.raises(DataError, match="demo needs calibration data for static ranges"):
        _backend(input="int8").quantize(model, data)


def test_no_module_is_an_error() -> None:
    with pytest.raises(QuantizationError, match=r"a model is a torch.nn.Module, not str"):
        _backend().quantize("model.pt")  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [None, 2])
def test_every_pass_sees_the_whole_calibration_set(model: nn.Module, limit: int | None) -> None:
    backend = _backend(input="int8", calibration={"batches": limit})
    entered = []

    @contextmanager
    def mode(name: str) -> Iterator[None]:
        entered.append(f"+{name}")
        yield
        entered.append(f"-{name}")

    def passes(prepared: Any, plan: Plan) -> Iterator[str]:
        for name in ("ranges", "biases"):
            with mode(name):
                yield name

    backend.passes = passes  # type: ignore[method-assign]
    reported: list[tuple[str, int, int | None]] = []
    generator = (batch for batch in BATCHES)
    backend.quantize(model, generator, progress=lambda *what: reported.append(what))
    count = limit or len(BATCHES)
    assert len(backend.seen) == 2 * count
    assert entered == ["+ranges", "-ranges", "+biases", "-biases"]
    assert [done for name, done, _ in reported if name == "biases"] == list(range(count + 1))
    assert {total for _, _, total in reported} == {count}


def test_a_failing_pass_leaves_its_mode(model: nn.Module) -> None:
    backend = _backend("calibrate", input="int8")
    left = []

    def passes(prepared: Any, plan: Plan) -> Iterator[str]:
        try:
            yield "ranges"
        finally:
            left.append(True)

    backend.passes = passes  # type: ignore[method-assign]
    with pytest.raises(QuantizationError):
        backend.quantize(model, BATCHES)
    assert left == [True]


def test_inputs_come_in_the_models_dtype_but_tokens_stay_integers(model: nn.Module) -> None:
    backend = _backend(input="int8")
    backend.quantize(model.to(torch.bfloat16), BATCHES)
    assert backend.seen[0].args[0].dtype == torch.bfloat16
    tokens = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    backend.quantize(tokens, [torch.arange(6).reshape(2, 3)])
    assert backend.seen[0].args[0].dtype == torch.int64


def test_batches_as_loaders_yield_them() -> None:
    x, y = torch.zeros(3, 2), torch.ones(3)
    assert as_batch(x).args == (x,)
    assert as_batch({"x": x}).kwargs == {"x": x}
    assert as_batch([x, y]).target is y
    assert as_batch(((x, x), y)).args == (x, x)
    assert as_batch(({"x": x}, y)).kwargs == {"x": x}
    batch = Batch((x,), {"mask": y})
    assert as_batch(batch) is batch
    assert len(batch) == 3
    assert [len(leaf) for leaf in batch.first().tensors()] == [1, 1]
    assert as_batch([x]).args == (x,)  # what a loader makes of TensorDataset(x)
    with pytest.raises(DataError, match="cannot read a batch from str. Yield a tensor"):
        as_batch("x")
    with pytest.raises(DataError, match="cannot read a batch from tuple of 3"):
        as_batch((x, x, x))


def test_places_may_be_text_and_their_folders_are_made(model: nn.Module, tmp_path: Path) -> None:
    class Kept(Rounded):
        def save(self, directory: Path) -> None:
            (directory / "kept").write_text("")

        def export(self, name: str, path: Path) -> Path:
            path.with_name(name).write_text("")
            return path.with_name(name)

    kept = Kept(model, _backend().make_plan(model))
    kept.save(f"{tmp_path}/a/b")  # type: ignore[arg-type]
    assert (tmp_path / "a" / "b" / "kept").exists()
    assert kept.export("form", f"{tmp_path}/c/d") == tmp_path / "c" / "form"  # type: ignore[arg-type]


def test_what_is_no_batches(model: nn.Module) -> None:
    for items, words in (
        (torch.zeros(5, 4), "calibration is a Tensor, not batches"),
        ({"x": torch.zeros(5, 4)}, "calibration is a dict, not batches"),
        ([torch.zeros(5, 9)], r"the float model cannot take \(float32 \[1, 9\]\)"),
        ([Batch((), {"y": 3})], r"the float model cannot take \(y=int\)"),
    ):
        with pytest.raises(DataError, match=words):
            _backend(input="int8").quantize(model, items)


def test_main_output_is_logits_or_the_first_tensor() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert main_output(a) is a
    assert main_output({"loss": a, "logits": b}) is b
    assert main_output((None, [b])) is b
    with pytest.raises(DataError, match="without any tensor"):
        main_output({"x": 1})


@pytest.mark.parametrize(
    ("text", "scales", "count"),
    [
        ("int8/channel", 6, 6 * 40 + 6 * 4),
        ("int4/group:10", 24, 120 + 24 * 4),
        ("int4/group:10/asym", 24, 120 + 24 * 4 + 12),
        ("int4/channel/power_of_two", 6, 120 + 6),
        ("mxfp4", None, 120 + 6 * 2),
    ],
)
def test_packed_sizes_are_exact(text: str, scales: int | None, count: int) -> None:
    spec = TensorSpec.model_validate(text).resolve("weight")
    encoding = Encoding(
        "a.weight", "a", "weight", spec.format, "x", axis=-1, symmetric=bool(spec.symmetric),
        scale=None if scales is None else torch.zeros(scales), scale_format=spec.scale or "",
    )  # fmt: skip
    found = packed_sizes({"a.weight": ((6, 40), 4), "a.bias": ((6,), 4)}, [encoding])
    assert found == {"a.weight": count, "a.bias": 24}


def test_zero_points_between_integers_are_stored_like_scales() -> None:
    scale = torch.ones(6)
    rounded = Encoding(
        "a",
        "a",
        "weight",
        "uint4",
        "channel",
        0,
        symmetric=False,
        scale=scale,
        zero_point=scale.int(),
    )
    unrounded = replace(rounded, zero_point=scale)
    assert rounded.parameter_bytes() == 6 * 4 + 6 * 4 // 8
    assert unrounded.parameter_bytes() == 6 * 4 + 6 * 4
