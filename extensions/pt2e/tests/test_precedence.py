"""The last rule that matches decides each node, for any list of rules; or ExecuTorch's order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quark_pt2e.backends.arm import EthosUBackend
from quark_pt2e.config.arm import EthosUConfig
from quark_pt2e.graph.capture import capture
from quark_pt2e.graph.encodings import conversion, is_dequantize, is_quantize
from quark_pt2e.graph.naming import Namer
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from quark_core.batch import Batch
from quark_core.errors import UnmatchedRuleError
from quark_core.selection import select

OPS = ("linear", "add", "mul", "tanh")
SPECS: tuple[dict[str, Any], ...] = (
    {"skip": True},
    {"weight": "int8", "input": "int8"},
    {"weight": "int8", "input": "int16/sym"},
    {"weight": "int4", "input": "int8"},
)


class Special(nn.Linear):
    """A linear layer by inheritance."""


class Cell(nn.Module):
    """A gate: two linear layers, one of them of a derived class."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gate = nn.Linear(4, 4), Special(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.fc(x)) * self.gate(x) + x
        return out


class Net(nn.Module):
    """Two gates and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = Cell(), Cell(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.b(self.a(x)))
        return out


def _model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


NAMES = st.sampled_from(["a", "b", "a.fc", "a.gate", "b.gate", "a.add", "b.mul", "head"])
TYPES = st.sampled_from(["Linear", "Special", "Cell", "torch.nn.modules.linear.Linear"])
NODES = st.sampled_from(["linear", "linear_1", "linear_3", "add", "mul_1", "tanh"])
SELECTORS = st.one_of(
    st.builds(lambda name: {"name": name}, NAMES),
    st.builds(lambda name: {"type": name}, TYPES),
    st.builds(lambda name: {"op": name}, st.sampled_from(OPS)),
    st.builds(lambda name: {"node": name}, NODES),
    st.builds(lambda name: {"io": name}, st.sampled_from(["input", "output"])),
    st.builds(lambda name, kind: {"name": name, "type": kind}, NAMES, TYPES),
)
RULES = st.lists(
    st.builds(
        lambda selector, spec: {**selector, **spec, "allow_unmatched": True},
        SELECTORS,
        st.sampled_from(SPECS),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.slow
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(rules=RULES)
def test_the_last_match_decides(rules: list[dict[str, Any]]) -> None:
    model, inputs = _model(), torch.randn(4, 4)
    config = EthosUConfig(name="ethos-u", weight="int8", input="int8", rules=rules)
    plan = EthosUBackend(config).make_plan(model, inputs)
    graph = capture(model, Batch((inputs,)), dynamic=False, strict=False).graph
    targets = [site.target for site in Namer(model).sites(graph)]
    decisions = select(targets, config).decisions
    checked = 0
    for target in targets:
        if target.op not in OPS:
            continue
        checked += 1
        entry, decision = plan[target.name], decisions[target.name]
        assert entry.rule == decision.why
        if decision.skip:
            assert entry.specs == {}, target.name
            continue
        wanted = decision.specs["input"]
        assert wanted is not None
        assert entry.input is not None, target.name
        assert entry.input.format == wanted.format, target.name
        if target.op == "linear":
            weight = decision.specs["weight"]
            assert weight is not None
            assert entry.weight is not None, target.name
            assert entry.weight.format == weight.format
    assert checked == 11


def test_one_node() -> None:
    rules = [{"type": "Cell", "skip": True}, {"node": "linear_3"}]
    config = EthosUConfig(name="ethos-u", weight="int8", input="int8", rules=rules)
    plan = EthosUBackend(config).make_plan(_model(), torch.randn(4, 4))
    weights = {entry.name for entry in plan.entries if entry.weight is not None}
    assert weights == {"b.gate", "head"}
    assert plan["b.gate"].rule == "rules[1] (node: linear_3)"


def test_nodes_that_do_not_exist() -> None:
    rules = [{"node": "linear_33", "skip": True}]
    config = EthosUConfig(name="ethos-u", weight="int8", input="int8", rules=rules)
    with pytest.raises(UnmatchedRuleError, match=r"node: linear_33.*linear_3"):
        EthosUBackend(config).make_plan(_model(), torch.randn(4, 4))


THEIR_SELECTORS = st.one_of(
    st.builds(lambda name: ("name", name), st.sampled_from(["a", "b", "a.fc", "b.gate", "head"])),
    st.builds(lambda kind: ("type", kind), st.sampled_from([nn.Linear, Special, Cell])),
    st.just(("io", "")),
)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    calls=st.lists(st.tuples(THEIR_SELECTORS, st.sampled_from(SPECS[1:3])), min_size=1, max_size=4)
)
def test_their_order_is_theirs(calls: list[tuple[tuple[str, Any], dict[str, Any]]]) -> None:
    """``precedence: executorch`` gives what the same calls on EthosUQuantizer give."""
    from executorch.backends.arm.ethosu import EthosUCompileSpec
    from executorch.backends.arm.quantizer import (
        EthosUQuantizer,
        get_symmetric_a16w8_quantization_config,
        get_symmetric_quantization_config,
    )

    ours = EthosUConfig(name="ethos-u", precedence="executorch", batch="static")
    specs = [{**spec, "input": spec["input"] + "/mse"} for _, spec in calls]
    ours = ours.set_global({"weight": "int8", "input": "int8/mse"})
    theirs = EthosUQuantizer(EthosUCompileSpec("ethos-u55-128"))
    theirs.set_global(get_symmetric_quantization_config())
    for ((kind, what), _), spec in zip(calls, specs, strict=True):
        wide = "int16" in spec["input"]
        config = (
            get_symmetric_a16w8_quantization_config()
            if wide
            else get_symmetric_quantization_config()
        )
        if kind == "name":
            ours = ours.set_module_name(what, spec)
            theirs.set_module_name(what, config)
        elif kind == "type":
            ours = ours.set_module_type(what, spec)
            theirs.set_module_type(what, config)
        else:
            ours = ours.set_io(spec)
            theirs.set_io(config)
    model, inputs = _model(), torch.randn(16, 4, generator=torch.Generator().manual_seed(2))
    quantized = EthosUBackend(ours).quantize(model, list(inputs[:, None]))
    with torch.no_grad():
        program = torch.export.export(model, (inputs[:1],), strict=False)
        prepared = prepare_pt2e(program.module(check_guards=False), theirs)
        for one in inputs:
            prepared(one[None])
        converted = convert_pt2e(prepared)
    assert _table(quantized.graph) == _table(converted)


def _table(graph: fx.GraphModule) -> list[tuple[Any, ...]]:
    rows = []
    for node in graph.graph.nodes:
        if is_quantize(node) or is_dequantize(node):
            row = conversion(node)
            assert row is not None
            assert row.scale is not None
            assert row.zero_point is not None
            rows.append((node.name, row.scale.tolist(), row.zero_point.tolist(), row.dtype))
    return rows
