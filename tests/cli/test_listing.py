"""``quark list``, ``info``, ``schema``, ``init``, ``doctor`` and the program's own manners."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from quark_core import QuantizerSpec
from quark_core.registry import registry
from quark_core.registry.requirements import missing
from quark_core.registry.specs import Diagnostic

Quark = Callable[..., Any]


def test_help_lists_every_command_and_exit_status(quark: Quark) -> None:
    said = quark("--help")
    assert said.status == 0
    for name in ("run", "plan", "compare", "report", "list", "info", "schema", "init", "doctor"):
        assert f"\n  {name} " in said.out
    assert "5 an accuracy gate was missed" in " ".join(said.out.split())


def test_version(quark: Quark) -> None:
    assert quark("--version").out.startswith("quark_core 0.")


def test_unknown_command_suggests_one(quark: Quark) -> None:
    said = quark("lsit")
    assert said.status == 2
    assert "no command 'lsit'. Did you mean 'list'?" in said.err


def test_unknown_option_is_a_usage_error(quark: Quark) -> None:
    said = quark("list", "--josn")
    assert said.status == 2
    assert "--josn" in said.err


def test_list_shows_both_backends(quark: Quark) -> None:
    said = quark("list")
    assert said.status == 0
    lines = {line.split()[0]: line for line in said.out.splitlines() if line}
    assert "quark-native" in lines["native"]
    assert "quark-brevitas" in lines["brevitas"]
    assert " ready " in lines["native"]


@pytest.mark.parametrize(
    ("kind", "member"),
    [
        ("metrics", "accuracy"),
        ("model-sources", "huggingface"),
        ("data-sources", "npz"),
        ("exporters", "checkpoint"),
    ],
)
def test_list_shows_other_kinds(quark: Quark, kind: str, member: str) -> None:
    said = quark("list", kind, "--json")
    found = {entry["name"]: entry for entry in json.loads(said.out)["entries"]}
    assert found[member]["distribution"] == "quark-core"
    assert all(entry["summary"] for entry in found.values())


@pytest.mark.parametrize("name", ["native", "brevitas"])
def test_info_tells_what_a_backend_can_do(quark: Quark, name: str) -> None:
    said = quark("info", name)
    assert said.status == 0
    assert "weight: " in said.out
    assert "save_load" in said.out
    data = json.loads(quark("info", name, "--json").out)
    assert data["name"] == name
    assert any("int8" in row["formats"] for row in data["supports"])


def test_info_shows_options_within_options(quark: Quark) -> None:
    said = quark("info", "brevitas")
    assert '  backend: "layerwise" (layerwise, fx)  How Brevitas' in said.out
    assert '\n      matrix: "hadamard" (hadamard, orthogonal)  ' in said.out
    assert "\n      gptq.damping: 0.01  " in said.out
    assert "\n          bits: required  " in said.out
    options = json.loads(quark("info", "brevitas", "--json").out)["options"]
    assert options["attention"]["within"]["spec"]["default"] == "int8/sym"


def test_info_of_every_backend(quark: Quark) -> None:
    for entry in registry().entries("quantizer"):
        if not missing(entry.spec.requires):
            assert json.loads(quark("info", entry.spec.name, "--json").out)["options"]
            assert "Options of its own" in quark("info", entry.spec.name).out


def test_info_on_an_unknown_backend(quark: Quark) -> None:
    said = quark("info", "nativ")
    assert said.status == 2
    assert "unknown quantizer 'nativ'" in said.err
    assert "Did you mean 'native'?" in said.err


@pytest.mark.parametrize("name", ["native", "brevitas"])
def test_schema_accepts_shorthand_and_refuses_unknown_fields(quark: Quark, name: str) -> None:
    schema = json.loads(quark("schema", name).out)
    good = {"name": name, "weight": "int8/channel", "rules": [{"glob": "head*", "skip": True}]}
    jsonschema.validate(good, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**good, "wieght": "int8"}, schema)


def test_schema_of_a_recipe(quark: Quark) -> None:
    schema = json.loads(quark("schema").out)
    assert {"model", "data", "quantizer", "evaluate"} <= set(schema["properties"])


@pytest.mark.parametrize("name", ["native", "brevitas"])
def test_init_writes_a_recipe_the_backend_accepts(quark: Quark, name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    said = quark("init", name, "-o", path)
    assert said.status == 0
    section = yaml.safe_load(path.read_text())["quantizer"]
    config = registry().config_class(name)(**section)
    assert config.weight is not None
    assert config.weight.format == "int8"
    assert config.input is not None


def test_init_never_overwrites(quark: Quark, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("precious")
    said = quark("init", "native", "-o", path)
    assert said.status == 2
    assert f"--output: {path} exists already: choose another name" in said.err
    assert path.read_text() == "precious"


def test_doctor_compares_tested_with_installed(quark: Quark) -> None:
    said = quark("doctor", "--json")
    checks = json.loads(said.out)["checks"]
    assert any(
        row["of"] == "quark-brevitas:brevitas" and row["check"].startswith("requires brevitas")
        for row in checks
    )
    assert any(row["check"].startswith("tested with torch==") for row in checks)
    assert said.status == (0 if all(row["ok"] for row in checks) else 6)


def test_doctor_shows_kernels(quark: Quark) -> None:
    checks = json.loads(quark("doctor", "--json").out)["checks"]
    assert any("kernel" in row["check"] for row in checks)


def test_doctor_exits_6_when_something_is_missing(quark: Quark) -> None:
    spec = QuantizerSpec("lacking", "a.b:C", "a.b:D", requires=("surely-not-installed>=1",))
    with registry().temporary() as found:
        found.register(spec)
        said, listed = quark("doctor"), quark("list")
    assert 'Run: pip install "surely-not-installed>=1"' in listed.out
    assert said.status == 6
    assert 'Run: pip install "surely-not-installed>=1"' in said.out


def test_diagnostic_has_plain_fields() -> None:
    assert Diagnostic("kernels", "eager") == Diagnostic("kernels", "eager", ok=True, fix="")
