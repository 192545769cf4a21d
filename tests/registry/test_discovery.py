"""Scanning metadata and registering from a program."""

from __future__ import annotations

from pathlib import Path

import pytest

from quark_core.errors import PluginError, UnknownNameError
from quark_core.registry import Registry, State
from quark_core.registry.discovery import scan
from quark_core.registry.specs import API_VERSION, MetricSpec, QuantizerSpec


def _dist_info(root: Path, name: str, version: str, entry_points: str) -> None:
    folder = root / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "entry_points.txt").write_text(entry_points)


def test_first_on_the_path_wins_when_a_distribution_is_there_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, version in (("new", "2.0"), ("old", "1.0")):
        _dist_info(tmp_path / place, "doubled", version, "[quark_core]\ndoubled = doubled.plugin\n")
        monkeypatch.syspath_prepend(tmp_path / place)
    found = [record for record in scan({}) if record.name == "doubled"]
    assert [(record.version, record.state) for record in found] == [("1.0", State.AVAILABLE)]


def test_damaged_metadata_hides_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _dist_info(tmp_path, "damaged", "1.0", "[quark_core]\nthis is no entry point at all\n= =\n")
    _dist_info(tmp_path, "sound", "1.0", "[quark_core]\nsound = sound.plugin\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "sound" in {record.name for record in scan({})}


def test_scan_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _dist_info(tmp_path, "absent", "1.0", "[quark_core]\nabsent = no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    record = next(record for record in scan({}) if record.name == "absent")
    assert (record.state, record.seconds) == (State.AVAILABLE, None)


SPEC = QuantizerSpec("mine", "tests_nowhere:Config", "tests_nowhere:Quantizer", summary="own")


def test_registered_spec_is_found_and_forgotten() -> None:
    found = Registry(plugins=[])
    with found.temporary():
        found.register(SPEC)
        assert found.get("quantizer", "mine").spec is SPEC
    with pytest.raises(UnknownNameError, match="unknown quantizer 'mine'"):
        found.get("quantizer", "mine")


def test_registering_twice_needs_override() -> None:
    found = Registry(plugins=[])
    found.register(SPEC)
    with pytest.raises(PluginError, match="'mine' is already provided by this-process"):
        found.register(SPEC)
    other = QuantizerSpec("mine", "a.b:C", "a.b:D")
    found.register(other, override=True)
    assert found.get("quantizer", "mine").spec is other
    assert [entry.spec for entry in found.entries("quantizer")] == [other]


def test_override_of_a_built_in_wins() -> None:
    found = Registry(plugins=[])
    mine = MetricSpec("accuracy", "a.b:C", summary="another accuracy")
    with pytest.raises(PluginError, match="'accuracy' is already provided by quark-core"):
        found.register(mine)
    found.register(mine, override=True)
    assert found.get("metric", "accuracy").spec is mine


def test_registering_nonsense_is_refused() -> None:
    found = Registry(plugins=[])
    with pytest.raises(PluginError, match="str cannot be registered"):
        found.register("mine")
    with pytest.raises(PluginError, match="config of 'mine' is 'nowhere', expected 'module:attr"):
        found.register(QuantizerSpec("mine", "nowhere", "a.b:C"))


def test_class_of_the_wrong_kind_is_refused() -> None:
    found = Registry(plugins=[])
    found.register(QuantizerSpec("odd", "pathlib:Path", "pathlib:Path"))
    with pytest.raises(PluginError, match="is no subclass of quark_core.QuantizationConfig"):
        found.config_class("odd")
    with pytest.raises(PluginError, match="is no subclass of quark_core.ModelQuantizer"):
        found.quantizer_class("odd")


def test_api_version_is_the_documented_one() -> None:
    assert API_VERSION == 1
