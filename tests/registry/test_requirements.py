"""Requirements against installed versions."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

from quark_core.registry.requirements import check, missing, satisfies

releases = st.lists(st.integers(0, 12), min_size=1, max_size=4).map(lambda n: ".".join(map(str, n)))
versions = st.builds(
    "{}{}".format, releases, st.sampled_from(["", "+cpu", "+cu13.0", "rc1", ".dev2"])
)
bounds = st.lists(st.tuples(st.sampled_from([">=", "<", "==", "~="]), releases), max_size=3)


@given(versions, bounds)
def test_judged_as_packaging_judges(version: str, wanted: list[tuple[str, str]]) -> None:
    if any(relation == "~=" and "." not in release for relation, release in wanted):
        return  # no such specifier
    text = "demo" + ",".join(relation + release for relation, release in wanted)
    expected = Requirement(text).specifier.contains(version, prereleases=True)
    assert satisfies(version, text) == expected


def test_installed_and_missing() -> None:
    assert check("pluggy>=1.0").satisfied
    assert str(check("pluggy>=99")).startswith("pluggy>=99 (1.")
    assert str(check("surely-not-installed")) == "surely-not-installed (not installed)"
    assert [found.text for found in missing(["pluggy", "pluggy<1"])] == ["pluggy<1"]
    assert check("pluggy!=0.5; python_version>'3'").satisfied


@pytest.mark.parametrize("text", ["torch>=2.6", "brevitas>=0.13,<0.14"])
def test_common_forms_need_no_parser(text: str) -> None:
    code = (
        "import sys; from quark_core.registry.requirements import check;"
        f"check({text!r}); assert 'packaging' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
