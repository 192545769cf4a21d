"""Rules: what they match, which one decides, and what is said of those that match nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quark_core.config import QuantizationConfig
from quark_core.errors import UnmatchedRuleError
from quark_core.plan import Plan, PlanEntry, Step
from quark_core.selection import Target, matches, select
from quark_core.spec import LayerRule, Selector, TensorSpec

BLOCK = ("Block", "models.Block", "Module")
TARGETS = (
    Target(
        "stem", ("Conv2d", "torch.nn.Conv2d", "Module"), "conv2d", ("input",), (("", ("Net",)),)
    ),
    Target("block.fc", ("Special", "Linear", "Module"), "linear", (), (("block", BLOCK),)),
    Target("block.out", ("Linear", "Module"), "linear", (), (("block", BLOCK),), "linear_1"),
    Target("head", ("Linear", "Module"), "linear", ("output",), (("", ("Net",)),)),
)
NAMES = [target.name for target in TARGETS]


def _matched(**criteria: Any) -> list[str]:
    return [target.name for target in TARGETS if matches(Selector(**criteria), target)]


@pytest.mark.parametrize(
    ("criteria", "names"),
    [
        ({"name": "head"}, ["head"]),
        ({"name": "block"}, ["block.fc", "block.out"]),
        ({"name": "hea"}, []),
        ({"glob": "block.*"}, ["block.fc", "block.out"]),
        ({"glob": "*"}, NAMES),
        ({"re": r"block\.(fc|x)"}, ["block.fc"]),
        ({"re": "block"}, []),
        ({"type": "Linear"}, ["block.fc", "block.out", "head"]),
        ({"type": "Special"}, ["block.fc"]),
        ({"type": "torch.nn.Conv2d"}, ["stem"]),
        ({"type": "models.Block"}, ["block.fc", "block.out"]),
        ({"op": "conv2d"}, ["stem"]),
        ({"node": "linear_1"}, ["block.out"]),
        ({"node": "linear"}, []),
        ({"io": "input"}, ["stem"]),
        ({"io": "output"}, ["head"]),
        ({"type": "Linear", "glob": "block.*"}, ["block.fc", "block.out"]),
        ({"type": "Linear", "io": "input"}, []),
    ],
)
def test_criteria(criteria: dict[str, Any], names: list[str]) -> None:
    assert _matched(**criteria) == names


def _config(*rules: dict[str, Any]) -> QuantizationConfig:
    return QuantizationConfig(name="x", weight="int8", input="int8", rules=rules)


def test_the_last_rule_decides_alone() -> None:
    found = select(
        TARGETS, _config({"type": "Linear", "weight": "int4"}, {"name": "head", "input": None})
    )
    head = found.decisions["head"]
    assert str(head.specs["weight"]) == "int8/channel/sym"  # not the earlier rule's int4
    assert head.specs["input"] is None
    assert head.why == "rules[1] (name: head)"
    assert str(found.decisions["block.fc"].specs["weight"]) == "int4/channel/sym"
    assert found.decisions["stem"].why == "defaults"


def test_skipping_and_taking_back() -> None:
    found = select(TARGETS, _config({"glob": "*", "skip": True}, {"name": "head"}))
    assert found.decisions["stem"].skip
    assert not any(found.decisions["stem"].specs.values())
    assert str(found.decisions["head"].specs["weight"]) == "int8/channel/sym"


@given(st.lists(st.sampled_from([*NAMES, "block", "nowhere"]), max_size=6))
def test_last_match_wins(order: list[str]) -> None:
    found = select(TARGETS, _config(*({"name": name, "skip": True} for name in order)))
    for target in TARGETS:
        names = {target.name, *(scope for scope, _ in target.scopes)}
        expected = max((i for i, name in enumerate(order) if name in names), default=None)
        assert found.decisions[target.name].rule == expected
    assert {rule.index for rule in found.unmatched} == {
        index for index, name in enumerate(order) if name == "nowhere"
    }


@pytest.mark.parametrize(
    ("rule", "near"),
    [
        ({"name": "haed"}, ("head",)),
        ({"type": "Conv2D"}, ("Conv2d",)),
        ({"op": "lineer"}, ("linear",)),
        ({"glob": "blok.fc"}, ("block.fc",)),
    ],
)
def test_near_misses_of_rules_that_match_nothing(
    rule: dict[str, Any], near: tuple[str, ...]
) -> None:
    (unmatched,) = select(TARGETS, _config({**rule, "skip": True})).unmatched
    assert set(near) <= set(unmatched.near)
    with pytest.raises(UnmatchedRuleError) as caught:
        Plan((), unmatched=(unmatched,)).require_matches()
    assert f"matches no layer (nearest: {near[0]}" in str(caught.value)
    assert "allow_unmatched: true accepts" in str(caught.value)


def test_an_end_of_the_model_without_a_layer_for_it() -> None:
    inner = [target for target in TARGETS if "input" not in target.io]
    (unmatched,) = select(inner, _config({"io": "input", "skip": True})).unmatched
    with pytest.raises(UnmatchedRuleError, match="quantizes nothing of what stands there"):
        Plan((), unmatched=(unmatched,)).require_matches()


def test_unmatched_can_be_allowed() -> None:
    rule = {"name": "nowhere", "skip": True, "allow_unmatched": True}
    assert select(TARGETS, _config(rule)).unmatched == ()


def test_plan_survives_json() -> None:
    spec = TensorSpec.model_validate("int4/group:32/asym").resolve("weight")
    entry = PlanEntry("a", "Linear", "linear", (3, 4), weight=spec, rule="rules[0]", reason="why")
    plan = Plan((entry,), True, (Step("calibrate", "ranges"),), (), ("careful",))
    assert Plan.from_dict(plan.to_dict()) == plan
    assert "a" in plan
    assert plan["a"].specs == {"weight": spec}


def test_rules_of_a_selector_describe_themselves() -> None:
    assert LayerRule(type="Linear", glob="a*", skip=True).describe() == "glob: a*, type: Linear"
