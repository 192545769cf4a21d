"""The registry: what plugins bring, by name.

The installed metadata is scanned once; a plugin is imported when something of its name is asked
for, or when everything is to be listed. A faulty plugin is recorded, never fatal, unless
``QUARK_STRICT_PLUGINS=1``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from quark_core.errors import (
    MissingDependencyError,
    PluginError,
    Problem,
    UnknownNameError,
    UnsupportedSpecError,
    did_you_mean,
)
from quark_core.registry import builtin, discovery, loading
from quark_core.registry.discovery import PluginRecord, State
from quark_core.registry.requirements import missing
from quark_core.registry.specs import Diagnostic, FormatExplanation

if TYPE_CHECKING:
    from quark_core.config import QuantizationConfig
    from quark_core.quantizer import ModelQuantizer

__all__ = ["Entry", "Kind", "PluginRecord", "Registry", "State", "register", "registry"]
Kind = Literal["quantizer", "exporter", "model_source", "data_source", "metric"]
_WORDS: dict[str, str] = {"model_source": "model source", "data_source": "data source"}
_UNUSABLE = (State.FAILED, State.INCOMPATIBLE, State.BLOCKED)


@dataclass(frozen=True)
class Entry:
    """Something by name, and the plugin that brings it."""

    spec: Any
    plugin: PluginRecord

    @property
    def qualified(self) -> str:
        """``distribution:name``, never ambiguous."""
        return f"{self.plugin.distribution}:{self.spec.name}"


class Registry:
    """Looks up quantizers, sources, metrics and exporters by name.

    Args:
        plugins: The plugins to work with; by default those installed.
    """

    def __init__(self, plugins: list[PluginRecord] | None = None) -> None:
        self.plugins = discovery.scan() if plugins is None else plugins
        self._manager = loading.new_manager()
        self._builtin = PluginRecord("quark-core", "quark-core", _own_version())
        self._builtin.state = State.LOADED
        self._builtin.specs = builtin.specs()
        self._local = PluginRecord("registered", "this-process", "0", state=State.LOADED)

    # Looking up.

    def get(self, kind: Kind, name: str) -> Entry:
        """The one thing of ``kind`` called ``name``, or ``distribution:name``.

        Only plugins that are needed to answer are imported: first the one whose entry point has
        the name, and all others only if that does not settle it.

        Raises:
            UnknownNameError: Nobody brings it; the message holds near misses.
            PluginError: The plugin that should bring it failed, is blocked or incompatible, or
                several bring it.
            MissingDependencyError: Something it requires is not installed.
        """
        entry = self._find(kind, name)
        lacking = missing(getattr(entry.spec, "requires", ()))
        if lacking:
            raise MissingDependencyError(
                f"{name!r} requires " + ", ".join(str(requirement) for requirement in lacking),
                where=entry.plugin.origin,
                fix="Run: pip install "
                + " ".join(f'"{requirement.text}"' for requirement in lacking),
            )
        return entry

    def entries(self, kind: Kind) -> list[Entry]:
        """Everything of ``kind``, from all plugins, sorted by name. Loads all plugins."""
        self.load_all()
        return sorted(self._loaded(kind), key=lambda entry: (entry.spec.name, entry.qualified))

    def load_all(self) -> list[PluginRecord]:
        """Load every plugin that can be, and return all records.

        Raises:
            PluginError: In strict mode, for the first plugin that is not usable.
        """
        for record in self.plugins:
            self._load(record)
        self._mark_name_conflicts()
        if os.environ.get(discovery.STRICT, "") not in ("", "0"):
            for record in self.plugins:
                if record.state in (State.FAILED, State.INCOMPATIBLE, State.CONFLICT):
                    raise _unusable(record)
        return self.plugins

    def resolve(self, entry: Entry, target: str) -> Any:
        """Import what a spec's import string names.

        Raises:
            PluginError: The import fails, or the module has no such attribute.
        """
        module, _, attribute = target.partition(":")
        try:
            found: Any = import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise PluginError(
                f"cannot import {target!r} for {entry.spec.name!r}",
                where=entry.plugin.origin,
                cause=f"{type(error).__name__}: {error}",
                fix=f"Reinstall or upgrade {entry.plugin.distribution}; `quark doctor` compares "
                "versions",
            ) from error
        return found

    def config_class(self, name: str) -> type[QuantizationConfig]:
        """The configuration class of a quantizer."""
        from quark_core.config import QuantizationConfig

        entry = self.get("quantizer", name)
        found: type[QuantizationConfig] = _subclass(
            self.resolve(entry, entry.spec.config), QuantizationConfig, entry
        )
        return found

    def quantizer_class(self, name: str) -> type[ModelQuantizer[Any]]:
        """The quantizer class of a quantizer."""
        from quark_core.quantizer import ModelQuantizer

        entry = self.get("quantizer", name)
        found: type[ModelQuantizer[Any]] = _subclass(
            self.resolve(entry, entry.spec.quantizer), ModelQuantizer, entry
        )
        return found

    # Registering from a program.

    def register(self, spec: Any, *, override: bool = False) -> None:
        """Add a spec for this process, as a plugin would bring it.

        Raises:
            PluginError: It is no spec, or its name is taken and ``override`` is false.
        """
        kind = _kind_of(spec)
        wrong = loading.check_specs([spec], kind)
        if wrong:
            raise PluginError(wrong, where="registry.register")
        taken = [entry for entry in self._loaded(kind) if entry.spec.name == spec.name]
        taken_by = [e.plugin for e in taken] or [r for r in self.plugins if r.name == spec.name]
        if taken_by and not override:
            raise PluginError(
                f"{spec.name!r} is already provided by {taken_by[0].distribution} "
                f"{taken_by[0].version}",
                where="registry.register",
                fix="Choose another name, or pass override=True",
            )
        own = self._local.specs.setdefault(kind, [])
        own[:] = [other for other in own if other.name != spec.name] + [spec]

    @contextmanager
    def temporary(self) -> Iterator[Registry]:
        """Forget at the end what was registered within the ``with`` block."""
        kept = {kind: list(specs) for kind, specs in self._local.specs.items()}
        try:
            yield self
        finally:
            self._local.specs = kept

    # Events.

    def emit(self, event: str, **arguments: Any) -> list[str]:
        """Tell every plugin that implements a hook; what raises becomes a sentence returned."""
        self.load_all()
        warnings = []
        for implementation in getattr(self._manager.hook, event).get_hookimpls():
            wanted = {name: arguments[name] for name in implementation.argnames}
            try:
                implementation.function(**wanted)
            except Exception as error:  # noqa: BLE001 (a tracker must not stop a run)
                name = implementation.plugin_name
                warnings.append(f"{name}: {event} raised {type(error).__name__}: {error}")
        return warnings

    def diagnostics(self) -> list[tuple[str, Diagnostic]]:
        """What each plugin says of itself to ``quark doctor``, by plugin."""
        self.load_all()
        found = []
        for implementation in self._manager.hook.quark_diagnostics.get_hookimpls():
            name = str(implementation.plugin_name)
            try:
                said: Any = implementation.function()
                found += [(name, diagnostic) for diagnostic in said]
            except Exception as error:  # noqa: BLE001 (the other plugins still report)
                what = f"raised {type(error).__name__}: {error}"
                found.append((name, Diagnostic("diagnostics", what, ok=False)))
        return found

    def explain_format(
        self, spec: str, values: list[float], profile: str
    ) -> tuple[str, FormatExplanation]:
        """What a format makes of some values, and the plugin that says so.

        Raises:
            UnsupportedSpecError: No plugin has arithmetic for the format.
        """
        self.load_all()
        for implementation in self._manager.hook.quark_explain_format.get_hookimpls():
            found: Any = implementation.function(spec=spec, values=values, profile=profile)
            if found is not None:
                return str(implementation.plugin_name), found
        text = f"no installed plugin has arithmetic for {spec}: pip install quark-native"
        raise UnsupportedSpecError([Problem("format", text)])

    # Inside.

    def _find(self, kind: Kind, name: str) -> Entry:
        distribution, _, bare = name.rpartition(":")
        if not distribution:
            local = [spec for spec in self._local.specs.get(kind, []) if spec.name == bare]
            if local:
                return Entry(local[0], self._local)
        candidates = [
            record
            for record in self.plugins
            if record.name == bare and _is(record, distribution) and kind == "quantizer"
        ]
        if len(candidates) > 1:
            usable = [record for record in candidates if record.state not in _UNUSABLE]
            if len(usable) > 1:
                raise _unusable(usable[0])
            candidates = usable or candidates
        for record in candidates:
            self._load(record)
            for spec in record.specs.get(kind, []):
                if spec.name == bare:
                    return Entry(spec, record)
            if record.state in _UNUSABLE:
                raise _unusable(record)
        self.load_all()
        found = [
            entry
            for entry in self._loaded(kind)
            if entry.spec.name == bare and _is(entry.plugin, distribution)
        ]
        if len(found) > 1:
            providers = [entry.plugin for entry in found]
            clash = PluginRecord(bare, providers[0].distribution, providers[0].version)
            discovery.mark_conflict(clash, providers, bare)
            raise _unusable(clash)
        if not found:
            raise self._unknown(kind, name)
        return found[0]

    def _load(self, record: PluginRecord) -> None:
        fresh = record.seconds is None and record.state in (State.AVAILABLE, State.CONFLICT)
        if fresh:
            loading.load(record, self._manager)

    def _loaded(self, kind: Kind) -> Iterator[Entry]:
        local = {spec.name for spec in self._local.specs.get(kind, [])}
        for record in (self._builtin, *self.plugins, self._local):
            for spec in record.specs.get(kind, []):
                if record is self._local or spec.name not in local:
                    yield Entry(spec, record)

    def _mark_name_conflicts(self) -> None:
        """Plugins whose entry points differ may still bring things of one name."""
        brought: dict[tuple[str, str], list[PluginRecord]] = {}
        for record in (self._builtin, *self.plugins):
            for kind, specs in record.specs.items():
                for spec in specs:
                    brought.setdefault((kind, spec.name), []).append(record)
        for (_, name), records in brought.items():
            if len(records) > 1:
                for record in records:
                    if record.state is State.LOADED and record is not self._builtin:
                        discovery.mark_conflict(record, records, name)

    def _unknown(self, kind: Kind, name: str) -> UnknownNameError:
        known = [entry.spec.name for entry in self.entries(kind)]
        word = _WORDS.get(kind, kind)
        hint = did_you_mean(name, known)
        listing = f"Known are {', '.join(dict.fromkeys(known)) or 'none'}"
        broken = [r.name for r in self.plugins if r.state in (State.FAILED, State.INCOMPATIBLE)]
        return UnknownNameError(
            f"unknown {word} {name!r}",
            cause=f"plugins that could not be loaded: {', '.join(broken)}" if broken else None,
            fix=f"{hint} {listing}".strip(),
        )


def _is(record: PluginRecord, distribution: str) -> bool:
    wanted = discovery.normalize(distribution)
    return not distribution or discovery.normalize(record.distribution) == wanted


def _unusable(record: PluginRecord) -> PluginError:
    if record.state is State.CONFLICT:
        return PluginError(f"the name {record.name!r} is ambiguous: {record.error}", fix=record.fix)
    return PluginError(
        f"the plugin is {record.state}: {record.error}", where=record.origin, fix=record.fix
    )


def _subclass(found: Any, wanted: type[Any], entry: Entry) -> Any:
    if not (isinstance(found, type) and issubclass(found, wanted)):
        raise PluginError(
            f"{found!r} is no subclass of quark_core.{wanted.__name__}",
            where=entry.plugin.origin,
            fix=f"Report it to the authors of {entry.plugin.distribution}",
        )
    return found


def _kind_of(spec: Any) -> Kind:
    kinds: dict[str, Kind] = {
        "QuantizerSpec": "quantizer",
        "ExporterSpec": "exporter",
        "MetricSpec": "metric",
    }
    kind = kinds.get(type(spec).__name__)
    if kind is None:
        raise PluginError(
            f"{type(spec).__name__} cannot be registered",
            where="registry.register",
            fix="Pass a QuantizerSpec, ExporterSpec or MetricSpec; sources come from plugins",
        )
    return kind


def _own_version() -> str:
    from quark_core import __version__

    return __version__


@lru_cache(maxsize=1)
def registry() -> Registry:
    """The registry of this process."""
    return Registry()


def register(spec: Any, *, override: bool = False) -> None:
    """Add a spec for this process; see :meth:`Registry.register`."""
    registry().register(spec, override=override)
