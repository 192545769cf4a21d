"""Finding plugins: one scan of the installed metadata, nothing imported."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import metadata
from typing import Any

from quark_core.registry.hookspecs import GROUP

DISABLE, ONLY, STRICT = "QUARK_PLUGINS_DISABLE", "QUARK_PLUGINS_ONLY", "QUARK_STRICT_PLUGINS"


class State(StrEnum):
    """Where a plugin stands."""

    AVAILABLE = "available"
    LOADED = "loaded"
    BLOCKED = "blocked"
    CONFLICT = "conflict"
    INCOMPATIBLE = "incompatible"
    FAILED = "failed"


@dataclass
class PluginRecord:
    """What is known of one plugin.

    Attributes:
        name: Name of its entry point.
        distribution: The distribution that brings it.
        version: That distribution's version.
        value: What the entry point names, ``package.module``.
        state: Where it stands.
        error: Why it is not usable, else empty.
        fix: What to do about that.
        notes: Oddities that do not stop it, such as printing on import.
        seconds: What importing it took, or None before that.
        specs: What it brings, by kind; filled when it is loaded.
    """

    name: str
    distribution: str
    version: str
    value: str = ""
    state: State = State.AVAILABLE
    error: str = ""
    fix: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float | None = None
    specs: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def qualified(self) -> str:
        """The name that is never ambiguous: ``distribution:name``."""
        return f"{self.distribution}:{self.name}"

    @property
    def origin(self) -> str:
        """For messages: ``plugin 'x' of dist 1.2``."""
        return f"plugin {self.name!r} of {self.distribution} {self.version}"

    def fail(self, state: State, error: str, fix: str) -> None:
        """Record why the plugin cannot be used."""
        self.state, self.error, self.fix = state, error, fix


def scan(environ: Mapping[str, str] = os.environ) -> list[PluginRecord]:
    """A record for each entry point of our group, sorted by distribution and name.

    A distribution installed twice counts where Python would import it from. Two distributions
    with one entry-point name are a conflict; the environment may block plugins by entry point
    or distribution name.
    """
    found: dict[tuple[str, str], PluginRecord] = {}
    for distribution, entry in _entry_points():
        record = PluginRecord(entry.name, distribution.name, distribution.version, entry.value)
        found.setdefault((normalize(record.distribution), record.name), record)
    records = [found[key] for key in sorted(found)]
    for record in records:
        _block(record, environ)
    names = Counter(record.name for record in records if record.state is State.AVAILABLE)
    for record in records:
        if record.state is State.AVAILABLE and names[record.name] > 1:
            rivals = [
                other
                for other in records
                if other.name == record.name and other.state is not State.BLOCKED
            ]
            mark_conflict(record, rivals)
    return records


def mark_conflict(record: PluginRecord, rivals: list[PluginRecord], name: str = "") -> None:
    """Record that several distributions bring one name, with the spelling that selects each."""
    name = name or record.name
    providers = ", ".join(f"{rival.distribution} {rival.version}" for rival in rivals)
    spellings = " or ".join(repr(f"{rival.distribution}:{name}") for rival in rivals)
    record.fail(
        State.CONFLICT,
        f"{name!r} is provided by {providers}",
        f"Write {spellings}, or uninstall one of them",
    )


def normalize(name: str) -> str:
    """A distribution's name as the packaging standard compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _entry_points() -> Iterator[tuple[metadata.Distribution, metadata.EntryPoint]]:
    for distribution in metadata.distributions():
        # One distribution with damaged metadata must not hide the others.
        try:
            text = distribution.read_text("entry_points.txt") or ""
            if GROUP not in text:
                continue
            entries = distribution.entry_points.select(group=GROUP)
            named = bool(distribution.name)
        except Exception:  # noqa: BLE001, S112
            continue
        if named:
            for entry in entries:
                yield distribution, entry


def _block(record: PluginRecord, environ: Mapping[str, str]) -> None:
    names = {record.name, record.qualified, record.distribution, normalize(record.distribution)}
    if names & _listed(environ, DISABLE):
        record.fail(State.BLOCKED, f"blocked by {DISABLE}", f"Unset {DISABLE}")
    only = _listed(environ, ONLY)
    if only and not names & only:
        record.fail(State.BLOCKED, f"not listed in {ONLY}", f"Add {record.name} to {ONLY}")


def _listed(environ: Mapping[str, str], variable: str) -> set[str]:
    return {name.strip() for name in environ.get(variable, "").split(",") if name.strip()}
