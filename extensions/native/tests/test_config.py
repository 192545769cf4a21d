"""What the configuration accepts and refuses."""

from __future__ import annotations

import pytest
from quark_native.config import NativeConfig
from quark_native.nn import OPS, layer_format

from quark_core.errors import UnsupportedSpecError
from quark_core.formats import EXAMPLES
from quark_core.spec import ROLES


def config(**specs: object) -> NativeConfig:
    return NativeConfig(name="native", **specs)


@pytest.mark.parametrize("spec", [name for name in EXAMPLES if name != "float32"])
def test_everything_in_the_table_has_arithmetic(spec):
    found = config(weight=spec, input=spec, output=f"{spec}/dynamic")
    for role in ("weight", "input", "output"):
        for op in OPS.values():
            fmt = layer_format(op, role, getattr(found, role))
            assert fmt.number.name == getattr(found, role).format


@pytest.mark.parametrize(
    ("role", "spec", "message"),
    [
        ("weight", "float32", "native cannot do float32 for a weight: accepted are int1..int32"),
        ("weight", "fp[1|8|7]", r"reaches from 2\^-133 to 2\^128, outside float32's"),
        ("weight", "bfp[8|8]{16}(su)/floor", "say how it is rounded: leave rounding out"),
        ("weight", "ternary/floor", "ternary is not rounded to multiples: leave rounding out"),
        ("weight", "int8/token", "cannot do granularity token for a weight"),
        ("weight", "int8/moving_average", "cannot do observer moving_average for a weight"),
        ("weight", "int8/e8m0", "cannot do scale e8m0 for a weight"),
        ("input", "int8/token", "accepted are tensor; granularity token needs dynamic true"),
        ("input", "int8/group:32", "granularity group needs dynamic true"),
        ("input", "int8/channel/mse", "granularity channel needs observer minmax or moving_av"),
        ("input", "int8/entropy", "cannot do observer entropy for an input"),
        ("bias", "int8/group:4", "cannot do granularity group for a bias"),
        ("bias", "mxfp4", "native cannot do mxfp4_e2m1 for a bias"),
    ],
)
def test_what_is_not_in_the_table_is_refused_with_its_place(role, spec, message):
    with pytest.raises(UnsupportedSpecError, match=message) as caught:
        config(**{role: spec})
    (problem,) = caught.value.problems
    assert problem.path.startswith(role)


def test_rules_are_checked_alike():
    with pytest.raises(UnsupportedSpecError, match=r"rules\[0\]\.weight\.format: fp\[1\|8\|7\]"):
        config(weight="int8", rules=[{"op": "linear", "weight": "fp[1|8|7]"}])


def test_every_role_has_rows():
    assert {role for row in NativeConfig.supports for role in row.roles} == set(ROLES)
