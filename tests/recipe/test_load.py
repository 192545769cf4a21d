"""Everything wrong with a recipe is said at once, with place, line and what would do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quark_core.errors import (
    ConfigError,
    DataError,
    MissingDependencyError,
    UnsupportedSpecError,
    UntrustedContentError,
)
from quark_core.recipe.load import load_recipe
from quark_core.registry import requirements

Write = Callable[..., Path]


def _problems(path: Path, **options: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, **options)  # type: ignore[arg-type]
    return [str(problem) for problem in caught.value.problems]


def test_places_in_data_and_models_are_those_of_the_recipe(recipe: Write, project: Path) -> None:
    loaded = load_recipe(recipe({"data.evaluation.input": "xx"}))
    with pytest.raises(DataError, match=r"^data.evaluation.input: data.npz has no array 'xx'"):
        loaded.load_data("evaluation")
    hub = recipe({"model": {"source": "huggingface", "path": "./nowhere"}})
    if requirements.check("transformers>=5").satisfied:
        (problem,) = _problems(hub)
        assert problem.endswith(f"model.path: {project / 'nowhere'} does not exist")


def test_what_an_export_requires_is_looked_for_first(
    recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        requirements, "check", lambda text: requirements.Requirement(text, None, "onnx" not in text)
    )
    file = recipe({"quantizer.name": "brevitas", "export": ["pt2", "onnx_qcdq"]})
    with pytest.raises(MissingDependencyError, match="'onnx_qcdq' requires onnx>=1.17 .not") as one:
        load_recipe(file)
    assert one.value.where == "export[1]"
    assert 'Run: pip install "onnx>=1.17" "onnxoptimizer' in str(one.value)


def test_every_problem_at_once_with_its_line(project: Path) -> None:
    file = project / "bad.yaml"
    file.write_text(
        """\
version: 1
model: {source: python, factory: modle.py:build}
data:
  calibration: {source: npz, path: data.npz, inptu: x}
  evaluation: {source: nzp, path: data.npz, input: x}
quantizer:
  name: native
  weigth: int8
  input: int99
  rules:
    - {glob: "a*", weight: int8/grup:3}
evaluate:
  metrics: [acuracy]
  require: {sqnr: ">= 30"}
exprot: [checkpoint]
"""
    )
    found = _problems(file)
    text = "\n".join(found)
    for line, path, words in (
        (2, "model.factory", "modle.py does not exist"),
        (4, "data.calibration.inptu", "unknown field. Did you mean 'input'?"),
        (4, "data.calibration.input", "required but missing"),
        (5, "data.evaluation.source", "unknown data source 'nzp'. Did you mean 'npz'?"),
        (8, "quantizer.weigth", "unknown field. Did you mean 'weight'?"),
        (9, "quantizer.input.format", "unknown number format 'int99'"),
        (11, "quantizer.rules[0].weight", "'grup:3' is no part of a spec"),
        (13, "evaluate.metrics[0]", "unknown metric 'acuracy'. Did you mean 'accuracy'?"),
        (15, "exprot", "unknown field. Did you mean 'export'?"),
    ):
        matching = [p for p in found if p.startswith(f"{file}:{line}: {path}: ")]
        assert matching, f"line {line} {path} is not in:\n{text}"
        assert any(words in problem for problem in matching), text
    assert any("require names sqnr, which metrics does not list" in problem for problem in found)


def test_unsupported_spec_lists_what_would_do(recipe: Write) -> None:
    path = recipe({"quantizer": {"name": "brevitas", "weight": "nvfp4"}})
    with pytest.raises(UnsupportedSpecError) as caught:
        load_recipe(path)
    assert (
        "quantizer.weight.format: brevitas cannot do nvfp4 for a weight: accepted are "
        "int2..int16, uint2..uint16"
    ) in str(caught.value)


def test_static_inputs_without_calibration(recipe: Write) -> None:
    (problem,) = _problems(recipe({"data.calibration": None}))
    assert "data.calibration: missing, but quantizer.input int8/tensor/asym has static" in problem
    assert "or write input: int8/dynamic" in problem


def test_unknown_export_lists_the_known(recipe: Write) -> None:
    (problem,) = _problems(recipe({"export": ["chekpoint"]}))
    assert (
        "export[0]: native cannot be written as 'chekpoint'. Did you mean 'checkpoint'" in problem
    )


def test_unknown_backend(recipe: Write) -> None:
    (problem,) = _problems(recipe(), quantizer="brevitsa")
    assert problem.startswith("--set: quantizer.name: unknown quantizer 'brevitsa'. Did you mean")


def test_missing_backend_name(recipe: Write) -> None:
    (problem,) = _problems(recipe({"quantizer": {"weight": "int8"}}))
    assert "quantizer.name: required but missing: name a backend, see quark list" in problem


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (0.9, 'a gate is text such as ">= 0.89", not 0.9'),
        ("about 0.9", "'about 0.9' is no gate: write >=, <=, > or < and a number"),
    ],
)
def test_bad_gate(recipe: Write, gate: object, words: str) -> None:
    (problem,) = _problems(recipe({"evaluate.require": {"accuracy": gate}}))
    assert "evaluate.require.accuracy: " in problem
    assert words in problem


def test_metric_with_wrong_options(recipe: Write) -> None:
    problems = _problems(
        recipe({"evaluate.metrics": [{"name": "topk", "k": 0}, {"name": "sqnr", "a": 1}]})
    )
    assert any("metric 'topk': k must be at least 1, not 0" in problem for problem in problems)
    assert any("metric 'sqnr': " in problem for problem in problems)


def test_near_misses_within_sections(recipe: Write) -> None:
    found = "\n".join(
        _problems(recipe({"evaluate.reqiure": {}, "data.evalution": {"source": "npz"}}))
    )
    assert "evaluate.reqiure: unknown field. Did you mean 'require'?" in found
    assert "data.evalution: unknown field. Did you mean 'evaluation'" in found


def test_metric_listed_twice(recipe: Write) -> None:
    (problem,) = _problems(recipe({"evaluate.metrics": ["sqnr", "sqnr"]}))
    assert "metrics names sqnr twice" in problem


def test_override_is_checked_and_named(recipe: Write) -> None:
    (problem,) = _problems(recipe(), overrides=["quantizer.weight=int8/token"])
    assert problem.startswith("--set: quantizer.weight.granularity: native cannot do")
    loaded = load_recipe(recipe(), overrides=["quantizer.weight=mxfp4", "evaluate.batches=1"])
    assert loaded.config.weight is not None
    assert loaded.config.weight.format == "mxfp4_e2m1"
    assert loaded.recipe.evaluate.batches == 1


def test_toml_says_the_same_as_yaml(recipe: Write, project: Path) -> None:
    file = project / "recipe.toml"
    file.write_text(
        """\
version = 1
name = "small"
export = ["checkpoint", "encodings"]

[model]
source = "python"
factory = "model.py:build"

[data]
calibration = {source = "npz", path = "data.npz", input = "x", batch_size = 8}
evaluation = {source = "npz", path = "data.npz", input = "x", target = "y", batch_size = 16}

[quantizer]
name = "native"
weight = "int8/channel"
input = "int8"

[evaluate]
metrics = ["accuracy", "sqnr"]
"""
    )
    assert load_recipe(file).data == load_recipe(recipe()).data
    file.write_text(file.read_text().replace('weight = "int8/channel"', 'weight = "int77"'))
    (problem,) = _problems(file)
    assert problem.startswith(f"{file}:15: quantizer.weight.format: unknown number format 'int77'")


def test_no_code_refuses_python_sources(recipe: Write) -> None:
    with pytest.raises(UntrustedContentError, match="source 'python' runs Python code that the"):
        load_recipe(recipe(), allow_code=False)


def test_missing_requirement_of_a_source(recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    from quark_core.registry import builtin
    from quark_core.registry.specs import SourceSpec

    lacking = SourceSpec("odd", "a.b:C", "a.b:d", requires=("surely-not-installed>=2",))
    monkeypatch.setattr(builtin, "MODEL_SOURCES", [*builtin.MODEL_SOURCES, lacking])
    from quark_core.registry import registry

    registry.cache_clear()
    try:
        with pytest.raises(MissingDependencyError, match="'odd' requires surely-not-installed>=2"):
            load_recipe(recipe({"model": {"source": "odd"}}))
    finally:
        registry.cache_clear()


def test_mapping_instead_of_a_file(
    recipe: Write, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_recipe(recipe()).data
    monkeypatch.chdir(project)
    assert load_recipe(data).load_model() is not None
    with pytest.raises(ConfigError, match="quantizer.weight.format: unknown number format"):
        load_recipe({**data, "quantizer": {"name": "native", "weight": "int77"}})
