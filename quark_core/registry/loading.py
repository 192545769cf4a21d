"""Loading one plugin so that whatever it does wrong stays its own problem."""

from __future__ import annotations

import io
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from typing import Any

import pluggy

from quark_core.errors import did_you_mean
from quark_core.registry import hookspecs
from quark_core.registry.discovery import DISABLE, PluginRecord, State
from quark_core.registry.specs import (
    API_VERSION,
    ExporterSpec,
    MetricSpec,
    QuantizerSpec,
    SourceSpec,
)

HOOKS: dict[str, tuple[str, type[Any]]] = {
    # kind: (hook, type of what the hook returns)
    "quantizer": ("quark_quantizers", QuantizerSpec),
    "exporter": ("quark_exporters", ExporterSpec),
    "model_source": ("quark_model_sources", SourceSpec),
    "data_source": ("quark_data_sources", SourceSpec),
    "metric": ("quark_metrics", MetricSpec),
}
SLOW_IMPORT_SECONDS = 0.5


def new_manager() -> pluggy.PluginManager:
    """A hook manager that knows our hooks and no plugin."""
    manager = pluggy.PluginManager(hookspecs.GROUP)
    manager.add_hookspecs(hookspecs)
    return manager


def load(record: PluginRecord, manager: pluggy.PluginManager) -> None:
    """Import a plugin and collect what it brings; on failure the record says why."""
    hide = f"Upgrade or uninstall {record.distribution}, or set {DISABLE}={record.name}"
    plugin = _import(record, hide)
    if plugin is None:
        return
    try:
        manager.register(plugin, record.qualified)
    except (ValueError, pluggy.PluginValidationError) as error:
        record.fail(State.FAILED, _first_line(error), hide)
        return
    collected = _collect(record, plugin, manager, hide)
    if collected is None:
        manager.unregister(plugin)
        return
    record.specs = collected
    if record.state is not State.CONFLICT:
        record.state = State.LOADED


def check_specs(specs: Any, kind: str) -> str:
    """What is wrong with a hook's return value, or an empty string."""
    hook, wanted = HOOKS[kind]
    if not isinstance(specs, list):
        return f"{hook}() returned {type(specs).__name__}, expected a list of {wanted.__name__}"
    for spec in specs:
        if not isinstance(spec, wanted):
            return f"{hook}() returned {type(spec).__name__} in its list, not {wanted.__name__}"
        for name in ("config", "quantizer", "options", "load", "metric", "export"):
            text = getattr(spec, name, None)
            if text is not None and not _is_import_string(text):
                return f"{hook}(): {name} of {spec.name!r} is {text!r}, expected 'module:attribute'"
    return ""


def _import(record: PluginRecord, hide: str) -> Any:
    module, _, attribute = record.value.partition(":")
    printed = io.StringIO()
    started = time.perf_counter()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            plugin = import_module(module.strip())
            for part in filter(None, attribute.strip().split(".")):
                plugin = getattr(plugin, part)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 (SystemExit too: a plugin may not end the host)
        record.fail(State.FAILED, f"import of {record.value} raised {_words(error)}", hide)
        plugin = None
    record.seconds = time.perf_counter() - started
    if record.seconds > SLOW_IMPORT_SECONDS:
        record.notes.append(f"took {record.seconds:.1f} s to import")
    if printed.getvalue().strip():
        first = printed.getvalue().strip().splitlines()[0]
        record.notes.append(f"printed on import: {first[:80]!r}")
    return plugin


def _collect(
    record: PluginRecord, plugin: Any, manager: pluggy.PluginManager, hide: str
) -> dict[str, list[Any]] | None:
    callers = manager.get_hookcallers(plugin) or []
    for caller in callers:
        if not caller.has_spec():
            known = [name for name in vars(hookspecs) if name.startswith("quark_")]
            hint = did_you_mean(caller.name, known)
            record.fail(State.FAILED, f"unknown hook {caller.name}. {hint}".strip(), hide)
            return None
    if not callers:
        record.fail(State.FAILED, f"{record.value} implements no hook", hide)
        return None
    mine = {caller.name for caller in callers}
    others = [other for _, other in manager.list_name_plugin() if other is not plugin]
    collected: dict[str, list[Any]] = {}
    for kind, (hook, _) in HOOKS.items():
        if hook not in mine:
            continue
        try:
            (specs,) = manager.subset_hook_caller(hook, others)() or ([],)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001
            record.fail(State.FAILED, f"{hook}() raised {_words(error)}", hide)
            return None
        wrong = check_specs(specs, kind)
        if wrong:
            record.fail(State.FAILED, wrong, hide)
            return None
        for spec in specs:
            if spec.api_version != API_VERSION:
                record.fail(
                    State.INCOMPATIBLE,
                    f"{spec.name!r} was built for plugin API {spec.api_version}, this quark-core "
                    f"speaks {API_VERSION}",
                    "Upgrade quark-core"
                    if spec.api_version > API_VERSION
                    else f"Upgrade {record.distribution}",
                )
                return None
        collected[kind] = specs
    return collected


def _is_import_string(text: Any) -> bool:
    if not isinstance(text, str):
        return False
    module, colon, attribute = text.partition(":")
    return bool(colon) and all(
        part.isidentifier() for part in [*module.split("."), *attribute.split(".")]
    )


def _words(error: BaseException) -> str:
    text = _first_line(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""
