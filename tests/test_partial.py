"""Finished layers outlive an interruption, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quark_native.quantizer import NativeQuantizer
from torch import nn

from quark_core import Partial, Plan, QuantizationConfig
from quark_core.recipe.folder import RunFolder
from quark_core.recipe.load import load_recipe
from quark_core.recipe.run import run_recipe


def test_what_was_put_is_found_by_the_next_attempt(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    Partial(tmp_path / "kept").put("layers/0 a", {"weight": shared, "turned": shared.T})
    found = Partial(tmp_path / "kept").get("layers/0 a")
    assert found is not None
    assert torch.equal(found["weight"], shared)
    assert torch.equal(found["turned"], shared.T)
    assert Partial(tmp_path / "kept").get("layers/1") is None
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_without_a_folder_nothing_is_kept(tmp_path: Path) -> None:
    partial = Partial()
    partial.put("a", {"weight": torch.ones(1)})
    assert partial.get("a") is None


def test_a_damaged_file_counts_as_missing(tmp_path: Path) -> None:
    partial = Partial(tmp_path)
    partial.put("a", {"weight": torch.ones(1)})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:10])
    assert partial.get("a") is None
    assert not file.exists()


def test_parts_of_another_key_go_and_a_finished_stage_keeps_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, {"stages": {}})
    Partial(folder.partial("quantize", "old")).put("a", {"weight": torch.ones(1)})
    new = folder.partial("quantize", "new")
    assert not list(tmp_path.iterdir())
    Partial(new).put("a", {"weight": torch.ones(1)})
    assert folder.partial("quantize", "new") == new
    assert Partial(new).get("a") is not None
    with folder.work("quantize") as place:
        folder.commit("quantize", place, {"key": "new"})
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


class LayerByLayer(NativeQuantizer):
    """Calibrates, then doubles one layer after the other, each after a pass over the data."""

    stop_after: int | None = None
    passed: list[str] = []  # noqa: RUF012

    def passes(self, prepared: Any, plan: Plan) -> Iterator[str]:
        yield "calibrate"
        for count, entry in enumerate(plan.quantized):
            weight = prepared.model.get_submodule(entry.name).weight
            found = self.partial.get(entry.name)
            if found is None:
                yield entry.name
                self.passed.append(entry.name)
                found = {"weight": weight * 2}
                self.partial.put(entry.name, found)
            weight.data.copy_(found["weight"])
            if count == self.stop_after:
                raise KeyboardInterrupt


@pytest.fixture
def slow_backend(monkeypatch: pytest.MonkeyPatch) -> type[LayerByLayer]:
    """The backend `native` goes layer by layer."""
    import quark_native.quantizer

    monkeypatch.setattr(quark_native.quantizer, "NativeQuantizer", LayerByLayer)
    monkeypatch.setattr(LayerByLayer, "passed", [])
    return LayerByLayer


def test_an_interrupted_run_goes_on_after_its_last_layer(
    recipe: Callable[..., Path],
    slow_backend: type[LayerByLayer],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    loaded = load_recipe(recipe())
    whole = run_recipe(loaded, folder=tmp_path / "a" / "run").folder
    assert slow_backend.passed == ["first", "last"]
    slow_backend.passed.clear()

    monkeypatch.setattr(slow_backend, "stop_after", 0)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(loaded, folder=tmp_path / "b" / "run")
    assert list((tmp_path / "b" / "run").glob(".partial-quantize-*"))
    monkeypatch.setattr(slow_backend, "stop_after", None)
    resumed = run_recipe(loaded, folder=tmp_path / "b" / "run").folder
    assert slow_backend.passed == ["first", "last"]
    assert not list(resumed.glob(".partial-*"))
    for name in ("metrics.json", "encodings.json"):
        assert json.loads((resumed / name).read_text()) == json.loads((whole / name).read_text())


def test_a_folder_from_python(slow_backend: type[LayerByLayer], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    config = slow_backend.config_class(name="native", weight="int8", input="int8")
    assert isinstance(config, QuantizationConfig)
    quantizer = slow_backend(config)
    data = [torch.randn(3, 4)]
    first = quantizer.quantize(model, data, partial=tmp_path)
    again = quantizer.quantize(model, data, partial=tmp_path)
    assert slow_backend.passed == ["0", "1"]
    weights = zip(first.module.parameters(), again.module.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    quantizer.quantize(model, data)
    assert slow_backend.passed == ["0", "1"] * 2
