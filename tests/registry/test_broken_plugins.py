"""A plugin can do anything wrong; the others go on working and the fault is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.install

Listing = Callable[..., dict[str, Any]]
Run = Callable[..., Any]

FAULTS = {
    "raises": ("failed", "ModuleNotFoundError: No module named 'a_library_nobody_has'"),
    "exits": ("failed", "SystemExit: this plugin wants to end the process"),
    "syntax": ("failed", "SyntaxError"),
    "type": ("failed", "quark_quantizers() returned dict, expected a list of QuantizerSpec"),
    "member": ("failed", "quark_quantizers() returned str in its list, not QuantizerSpec"),
    "hook-raises": ("failed", "quark_quantizers() raised RuntimeError: no licence file"),
    "typo": ("failed", "unknown hook quark_quantizer. Did you mean 'quark_quantizers'"),
    "empty": ("failed", "demo_empty.plugin implements no hook"),
    "string": ("failed", "config of 'string' is 'not an import string', expected 'module:attr"),
    "future": ("incompatible", "'future' was built for plugin API 99, this quark-core speaks 1"),
    "past": ("incompatible", "'past' was built for plugin API 0, this quark-core speaks 1"),
}


def test_list_names_every_fault_and_keeps_the_healthy(listing: Listing) -> None:
    found = listing()
    faults = {fault["plugin"]: fault for fault in found["faults"]}
    for name, (state, message) in FAULTS.items():
        assert faults[name]["state"] == state
        assert message in faults[name]["error"]
        assert faults[name]["from"] == f"{faults[name]['distribution']} 1.2"
    ready = {entry["name"] for entry in found["entries"] if entry["state"] == "ready"}
    assert {"healthy", "prints", "slow", "healthy2", "native", "brevitas"} <= ready


def test_every_fault_says_what_to_do(listing: Listing) -> None:
    faults = {fault["plugin"]: fault["fix"] for fault in listing()["faults"]}
    assert faults["raises"] == (
        "Upgrade or uninstall demo-raises, or set QUARK_PLUGINS_DISABLE=raises"
    )
    assert faults["future"] == "Upgrade quark-core"
    assert faults["past"] == "Upgrade demo-past"


def test_oddities_are_noted_not_fatal(listing: Listing) -> None:
    notes = {entry["name"]: entry["notes"] for entry in listing()["entries"]}
    assert notes["prints"] == ["printed on import: 'hello from a plugin'"]
    assert len(notes["slow"]) == 1
    assert notes["slow"][0].endswith("s to import")


def test_printing_plugin_does_not_spoil_the_output(python: Run) -> None:
    done = python("from quark_core.cli import main; main(['list'])")
    assert "hello from a plugin" not in done.stdout.splitlines()[0]
    assert done.stdout.startswith("NAME")


def test_timing_shows_the_slow_plugin_first(python: Run) -> None:
    done = python("from quark_core.cli import main; main(['list', '--timing'])")
    table = done.stdout[done.stdout.rindex("PLUGIN ") :].splitlines()
    assert table[1].split()[0] == "slow"
    assert float(table[1].split()[-2]) > 700


def test_missing_requirement_is_shown_and_refused(listing: Listing, python: Run) -> None:
    entry = next(entry for entry in listing()["entries"] if entry["name"] == "needs")
    assert entry["state"] == "missing"
    assert entry["missing"][0] == "surely-not-installed>=3 (not installed)"
    done = python("from quark_core.cli import main; main(['info', 'needs'])")
    assert done.returncode == 6
    assert "'needs' requires surely-not-installed>=3 (not installed), pluggy>=99 (" in done.stderr
    assert 'Run: pip install "surely-not-installed>=3" "pluggy>=99"' in done.stderr


def test_conflict_lists_providers_and_spellings(listing: Listing, python: Run) -> None:
    twins = [fault for fault in listing()["faults"] if fault["plugin"] == "twin"]
    assert len(twins) == 2
    assert twins[0]["error"] == "'twin' is provided by twin-one 1.2, twin-two 1.2"
    assert twins[0]["fix"] == "Write 'twin-one:twin' or 'twin-two:twin', or uninstall one of them"
    done = python("from quark_core.cli import main; main(['info', 'twin'])")
    assert done.returncode == 3
    assert "the name 'twin' is ambiguous: 'twin' is provided by twin-one 1.2" in done.stderr


@pytest.mark.parametrize("distribution", ["twin-one", "twin-two", "Twin_Two"])
def test_qualified_name_selects_one_of_two(python: Run, distribution: str) -> None:
    done = python(
        "from quark_core.registry import registry\n"
        f"print(registry().get('quantizer', '{distribution}:twin').spec.config)"
    )
    assert done.stdout.strip() == f"{distribution.replace('-', '_').lower()}.code:Config"


def test_asking_for_a_failed_plugin_repeats_its_fault(python: Run) -> None:
    done = python("from quark_core.cli import main; main(['info', 'raises'])")
    assert done.returncode == 3
    assert (
        "plugin 'raises' of demo-raises 1.2: the plugin is failed: import of demo_raises.plugin "
        "raised ModuleNotFoundError: No module named 'a_library_nobody_has'. Upgrade or uninstall"
    ) in done.stderr


def test_import_string_that_leads_nowhere(python: Run) -> None:
    done = python("from quark_core.cli import main; main(['schema', 'healthy'])")
    assert done.returncode == 3
    assert "cannot import 'demo_healthy.code:Config' for 'healthy'" in done.stderr
    assert "ModuleNotFoundError" in done.stderr


def test_asking_by_name_loads_no_other_plugin(python: Run) -> None:
    done = python(
        "import sys\nfrom quark_core.registry import registry\n"
        "registry().get('quantizer', 'healthy')\n"
        "print([name for name in sys.modules if name.startswith('demo_')])"
    )
    assert done.stdout.strip() == "['demo_healthy', 'demo_healthy.plugin']"


def test_name_differs_from_entry_point(python: Run) -> None:
    done = python(
        "from quark_core.registry import registry\n"
        "print(registry().get('quantizer', 'healthy2').plugin.name)"
    )
    assert done.stdout.strip() == "alias"


def test_disable_blocks_by_plugin_or_distribution(listing: Listing, python: Run) -> None:
    found = listing(QUARK_PLUGINS_DISABLE="healthy, demo-slow")
    faults = {fault["plugin"]: fault for fault in found["faults"]}
    assert faults["healthy"]["error"] == "blocked by QUARK_PLUGINS_DISABLE"
    assert faults["slow"]["state"] == "blocked"
    assert not {"healthy", "slow"} & {entry["name"] for entry in found["entries"]}
    done = python(
        "from quark_core.cli import main; main(['info', 'healthy'])",
        QUARK_PLUGINS_DISABLE="healthy",
    )
    assert done.returncode == 3
    assert "the plugin is blocked: blocked by QUARK_PLUGINS_DISABLE. Unset" in done.stderr


def test_disabling_one_twin_ends_the_conflict(python: Run) -> None:
    done = python(
        "from quark_core.registry import registry\n"
        "print(registry().get('quantizer', 'twin').plugin.distribution)",
        QUARK_PLUGINS_DISABLE="twin-one",
    )
    assert done.stdout.strip() == "twin-two"


def test_only_admits_nothing_else(listing: Listing) -> None:
    found = listing(QUARK_PLUGINS_ONLY="healthy")
    assert [entry["name"] for entry in found["entries"]] == ["healthy"]
    errors = {fault["error"] for fault in found["faults"]}
    assert errors == {"not listed in QUARK_PLUGINS_ONLY"}


def test_strict_mode_raises_for_the_first_fault(python: Run) -> None:
    done = python(
        "from quark_core.cli import main; main(['list'])",
        QUARK_STRICT_PLUGINS="1",
        QUARK_PLUGINS_ONLY="raises,healthy",
    )
    assert done.returncode == 3
    assert "plugin 'raises' of demo-raises 1.2: the plugin is failed" in done.stderr


def test_strict_mode_is_silent_without_faults(python: Run) -> None:
    done = python(
        "from quark_core.cli import main; main(['list'])",
        QUARK_STRICT_PLUGINS="1",
        QUARK_PLUGINS_ONLY="healthy",
    )
    assert done.returncode == 0, done.stderr


def test_unknown_name_offers_near_misses_and_names_the_broken(python: Run) -> None:
    done = python("from quark_core.cli import main; main(['info', 'helthy'])")
    assert done.returncode == 2
    assert "unknown quantizer 'helthy'" in done.stderr
    assert "Did you mean 'healthy'" in done.stderr
    assert "plugins that could not be loaded: empty, exits, future" in done.stderr
