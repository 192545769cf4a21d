"""``quark doctor``: what is installed against what was tested, and what will run."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import click

from quark_core.cli.output import echo_json, echo_table, json_option
from quark_core.errors import ExitCode


@click.command("doctor")
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Check versions, requirements and kernels.

    Compares what each plugin requires, and was tested with, against what is installed; asks
    each plugin what will run on this machine. Exit status 6 if something needs attention.
    """
    from quark_core.registry import registry

    found = registry()
    rows = [_row("python", "", platform.python_version(), True, "")]
    rows += [_requirement("quark-core", text) for text in _own_requirements()]
    for entry in found.entries("quantizer"):
        rows += [_requirement(entry.qualified, text) for text in entry.spec.requires]
        rows += [_tested(entry.qualified, text) for text in entry.spec.tested]
    for record in found.plugins:
        if record.error:
            rows.append(_row(record.qualified, str(record.state), record.error, False, record.fix))
    for plugin, diagnostic in found.diagnostics():
        rows.append(_row(plugin, diagnostic.name, diagnostic.value, diagnostic.ok, diagnostic.fix))
    if as_json:
        echo_json({"checks": rows})
    else:
        echo_table(
            ("", "OF", "CHECK", "FOUND"),
            [(_mark(row), row["of"], row["check"], row["found"]) for row in rows],
        )
        for row in rows:
            if row["fix"]:
                click.echo(f"\n{row['of']}, {row['check']}: {row['fix']}.")
    if not all(row["ok"] for row in rows):
        ctx.exit(ExitCode.ENVIRONMENT)


def _own_requirements() -> list[str]:
    """What quark-core itself requires, extras left out."""
    return [text for text in metadata.requires("quark-core") or [] if "extra ==" not in text]


def _mark(row: dict[str, Any]) -> str:
    if not row["ok"]:
        return "bad"
    return "note" if row["fix"] else "ok"


def _row(of: str, check: str, found: str, ok: bool, fix: str) -> dict[str, Any]:
    return {"of": of, "check": check, "found": found, "ok": ok, "fix": fix.rstrip(".")}


def _requirement(of: str, text: str) -> dict[str, Any]:
    from quark_core.registry.requirements import check

    result = check(text)
    fix = "" if result.satisfied else f'Run: pip install "{text}"'
    return _row(of, f"requires {text}", result.installed or "missing", result.satisfied, fix)


def _tested(of: str, text: str) -> dict[str, Any]:
    """Another version than the tested one deserves a note, not an alarm."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    parsed = Requirement(text)
    try:
        installed = metadata.version(parsed.name)
    except metadata.PackageNotFoundError:
        # What is required and missing has a row of its own.
        return _row(of, f"tested with {text}", "not installed", True, "")
    same = parsed.specifier.contains(Version(installed).public, prereleases=True)
    fix = "" if same else f'Not tested with {installed}; if in doubt: pip install "{text}"'
    return _row(of, f"tested with {text}", installed, True, fix)
