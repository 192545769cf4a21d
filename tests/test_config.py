"""Specs, support tables and configurations: what is accepted, and what is said otherwise."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from quark_core.config import QuantizationConfig
from quark_core.errors import ConfigError, UnsupportedSpecError
from quark_core.spec import FrozenModel, Granularity, LayerRule, Observer, Role, TensorSpec
from quark_core.support import Support, integers, misfit, shorten

kinds = st.one_of(
    st.sampled_from(["tensor", "token", "channel"]),
    st.builds("channel:{}".format, st.integers(-4, 4)),
    st.builds("group:{}".format, st.integers(1, 999)),
    st.builds("group:{}@{}".format, st.integers(1, 999), st.integers(-4, 4)),
    st.builds("block:{}x{}".format, st.integers(1, 99), st.integers(1, 99)),
)
parts = st.permutations(["group:64", "asym", "percentile:99.5", "stochastic"])


@given(kinds)
def test_granularity_reads_what_it_writes(text: str) -> None:
    assert str(Granularity.parse(text)) == text


@pytest.mark.parametrize("text", ["grup:3", "group", "group:0", "block:2x0", "channel:x", ""])
def test_bad_granularity(text: str) -> None:
    with pytest.raises(ValueError, match="granularity|at least one element"):
        Granularity.parse(text)


@given(parts)
def test_shorthand_in_any_order(order: list[str]) -> None:
    spec = TensorSpec.model_validate("/".join(["int4", *order]))
    assert spec == TensorSpec(
        format="int4",
        granularity=Granularity("group", size=64),
        symmetric=False,
        observer=Observer(name="percentile", percentile=99.5),
        rounding="stochastic",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int8/sym/asym", "says symmetric twice"),
        ("int8/often", "'often' is no part of a spec"),
        ("int8/minmax:3", "observer 'minmax' takes no argument"),
        ("int8/percentile:20", "greater than 50"),
        ("int77", "unknown number format 'int77'"),
        (5, "a spec is text such as int8/channel, or a mapping, not 5"),
    ],
)
def test_bad_shorthand(text: object, words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TensorSpec.model_validate(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "role", "expected"),
    [
        ("int8", "weight", "int8/channel/sym"),
        ("int8", "input", "int8/tensor/asym"),
        ("int8/dynamic", "input", "int8/tensor/asym/dynamic"),
        ("fp8_e4m3", "weight", "fp8_e4m3/channel"),
        ("mxfp4", "input", "mxfp4_e2m1"),
        ("mxfp4/group:16", "weight", "mxfp4_e2m1{16}"),
        ("int32", "bias", "int32/channel/sym"),
    ],
)
def test_what_is_left_out_is_filled_in_by_role(text: str, role: Role, expected: str) -> None:
    resolved = TensorSpec.model_validate(text).resolve(role)
    assert str(resolved) == expected
    assert TensorSpec.model_validate(expected).resolve(role) == resolved


@pytest.mark.parametrize(
    ("text", "role", "words"),
    [
        ("int8/dynamic", "weight", "a weight is constant: dynamic is for input and output"),
        ("fp8_e4m3/asym", "input", "fp8_e4m3 has no zero point"),
        ("mxfp4/tensor", "weight", "shares a scale in blocks of 32"),
        ("mxfp4/float32", "weight", "has e8m0 scales by definition, not float32"),
        ("mxfp4/minmax", "weight", "takes each block's scale from the block itself"),
        ("mxfp4/asym", "weight", "has no zero point"),
        ("nvfp4/group:8", "weight", "the block size of 'nvfp4' is not a choice"),
    ],
)
def test_contradictions(text: str, role: Role, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TensorSpec.model_validate(text).resolve(role)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"skip": True}, "a rule needs at least one of name, glob, re, type, op, node, io"),
        ({"re": "(", "skip": True}, "not a regular expression"),
        ({"name": "a", "skip": True, "weight": "int8"}, "skip: true leaves the layer alone"),
        ({"name": "a", "wieght": "int8"}, "Extra inputs are not permitted"),
    ],
)
def test_bad_rules(rule: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        LayerRule.model_validate(rule)


class DemoConfig(QuantizationConfig):
    """A backend's configuration."""

    supports: ClassVar[Sequence[Support]] = (
        Support(("weight",), integers(2, 8), ("tensor", "channel", "group"), (True, False)),
        Support(("weight",), ("mx*",), ("group",), scale=("e8m0",)),
        Support(("input",), ("int8",), ("tensor",), (True, False), dynamic=(True, False)),
    )
    depth: int = Field(default=3, gt=0)


def _problems(**fields: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        DemoConfig(name="demo", **fields)
    return [str(problem) for problem in caught.value.problems]


def test_all_problems_at_once() -> None:
    found = "\n".join(
        _problems(
            weigth="int8",
            weight="int4/token",
            input="mxfp4",
            depth=0,
            rules=[{"glob": "*", "weight": "int9"}, {"re": "("}, {"name": "a", "skpi": True}],
        )
    )
    for words in (
        "weigth: unknown field. Did you mean 'weight'?",
        "weight.granularity: demo cannot do granularity token for a weight of format int4: "
        "accepted are tensor, channel, group",
        "input.format: demo cannot do mxfp4_e2m1 for an input: accepted are int8",
        "depth: Input should be greater than 0, got 0",
        "rules[0].weight.format: demo cannot do int9 for a weight: accepted are int2..int8, mx*",
        "rules[1].re: not a regular expression",
        "rules[2].skpi: unknown field. Did you mean 'skip'?",
    ):
        assert words in found


class Round(FrozenModel):
    """One way."""

    name: Literal["round"] = "round"
    steps: int = Field(default=3, gt=0)


class Search(FrozenModel):
    """Another."""

    name: Literal["search"] = "search"
    fast: bool = False


class NestedConfig(QuantizationConfig):
    """A configuration with options of options."""

    instead: ClassVar[Mapping[str, str]] = {"magic": "method: {name: search}"}
    method: Annotated[Round | Search, Field(discriminator="name")] | None = None
    search: Search | None = None
    ends: tuple[str, ...] = ()
    size: Literal["small", "large"] = "small"
    code: str = Field(default="a1", pattern=r"[a-z]\d", description="A letter and a digit.")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": {"name": "round", "stpes": 3}}, "method.stpes: unknown field. Did you mean"),
        ({"method": {"name": "round", "steps": 0}}, "method.steps: Input should be greater than 0"),
        ({"method": {"name": "rounds"}}, "method: 'rounds' is not accepted: write round, search"),
        ({"method": {"steps": 1}}, "method: 'name' is required but missing"),
        ({"method": 3}, "method: 3 is not accepted: write a mapping"),
        ({"search": True}, "write a mapping, {} for its defaults; it may hold name, fast"),
        ({"search": {"fast": "no way"}}, "search.fast: 'no way' is not accepted: write true or"),
        ({"ends": "a"}, "ends: 'a' is not accepted: write a list"),
        ({"size": "smal"}, "write 'small' or 'large'. Did you mean 'small'?"),
        ({"code": "11"}, "code: '11' is not accepted. Accepted: A letter and a digit"),
        ({"magic": 1}, "magic: unknown field. Write method: {name: search}"),
        ({"seed": "one"}, "seed: 'one' is not accepted: write a whole number"),
    ],
)
def test_problems_of_nested_options(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        NestedConfig(name="demo", **fields)
    assert words in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_unsupported_specs_alone_have_their_own_error() -> None:
    with pytest.raises(UnsupportedSpecError, match="does not quantize the output of a layer"):
        DemoConfig(name="demo", output="int8")
    with pytest.raises(ConfigError) as caught:
        DemoConfig(name="demo", weight="int77")
    assert not isinstance(caught.value, UnsupportedSpecError)


def test_specs_in_a_configuration_are_complete() -> None:
    config = DemoConfig(
        name="demo", weight="int4/group:32", rules=[{"glob": "*", "weight": "mxfp4"}]
    )
    assert config.weight is not None
    assert config.weight.observer == Observer()
    assert config.rules[0].weight is not None
    assert config.rules[0].weight.scale == "e8m0"


def test_configurations_are_frozen() -> None:
    config = DemoConfig(name="demo", weight="int8")
    with pytest.raises(ValidationError, match="frozen"):
        config.depth = 4  # type: ignore[misc]


def test_json_and_back() -> None:
    config = DemoConfig(
        name="demo",
        weight="int4/group:32/asym",
        input="int8/dynamic",
        rules=[{"name": "a", "input": None}, {"type": "Linear", "skip": True}],
        depth=5,
    )
    text = json.dumps(config.model_dump(mode="json", exclude_unset=True))
    again = DemoConfig(**json.loads(text))
    assert again == config
    assert "input" in again.rules[0].model_fields_set
    assert "weight" not in again.rules[0].model_fields_set


@pytest.mark.parametrize(
    "fields",
    [
        {"weight": "int8"},
        {"weight": {"format": "int4", "granularity": "group:128", "observer": "minmax"}},
        {"input": None, "rules": [{"glob": "*", "weight": "int4"}]},
    ],
)
def test_schema_describes_what_is_accepted(fields: dict[str, Any]) -> None:
    DemoConfig(name="demo", **fields)
    jsonschema.validate({"name": "demo", **fields}, DemoConfig.model_json_schema())


def test_schema_refuses_what_is_refused() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "demo", "wieght": "int8"}, DemoConfig.model_json_schema())


def test_closest_row_explains() -> None:
    spec = TensorSpec.model_validate("int4/channel/power_of_two").resolve("weight")
    found = misfit(spec, "weight", DemoConfig.supports, "demo")
    assert found is not None
    assert found[0] == "scale"
    assert (
        "cannot do scale power_of_two for a weight of format int4: accepted are float32" in found[1]
    )


@pytest.mark.parametrize(("given", "near"), [("int12", "int8"), ("int1", "int2")])
def test_the_nearest_integer_is_that_of_the_nearest_width(given: str, near: str) -> None:
    assert _problems(weight=given)[0].endswith(f"; nearest: {near}")


def test_formats_are_listed_as_a_recipe_spells_them() -> None:
    assert list(shorten(["int2", "int3", "int4", "fp8_e4m3", "fp[1|*", "mx*"])) == [
        "int2..int4",
        "fp8_e4m3",
        "fp[1|e|m]",
        "mx*",
    ]
