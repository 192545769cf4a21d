"""``quark info``: what one backend can do."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from quark_core.cli.output import echo_json, json_option


@click.command("info")
@click.argument("name")
@json_option
def command(name: str, as_json: bool) -> None:
    """Show what backend NAME can do: specs by tensor, own options, capabilities."""
    from quark_core.config import QuantizationConfig
    from quark_core.registry import registry
    from quark_core.registry.requirements import check

    found = registry()
    entry = found.get("quantizer", name)
    config = found.config_class(name)
    own = {
        key: field
        for key, field in config.model_fields.items()
        if key not in QuantizationConfig.model_fields
    }
    data: dict[str, Any] = {
        "name": entry.spec.name,
        "summary": entry.spec.summary,
        "distribution": entry.plugin.distribution,
        "version": entry.plugin.version,
        "requires": [asdict(check(text)) for text in entry.spec.requires],
        "capabilities": asdict(entry.spec.capabilities),
        "supports": [row.as_dict() for row in config.supports or ()],
        "options": {
            key: {
                "default": field.get_default(call_default_factory=True),
                "description": field.description or "",
            }
            for key, field in own.items()
        },
    }
    if as_json:
        echo_json(data)
    else:
        _show(data)


def _show(data: dict[str, Any]) -> None:
    from quark_core.registry.requirements import missing
    from quark_core.support import shorten

    click.echo(f"{data['name']}: {data['summary']}")
    click.echo(f"from {data['distribution']} {data['version']}")
    for requirement in data["requires"]:
        click.echo(f"requires {requirement['text']} (installed: {requirement['installed']})")
    click.echo("\nSpecs")
    if not data["supports"]:
        click.echo("  not declared: any spec is handed to the backend")
    for row in data["supports"]:
        click.echo(f"  {', '.join(row['roles'])}: {', '.join(shorten(row['formats']))}")
        for key in ("granularity", "symmetric", "scale", "observer", "rounding", "dynamic"):
            values = ", ".join(str(value).lower() for value in row[key])
            click.echo(f"    {key:<12} {values or '-'}")
    if data["options"]:
        click.echo("\nOptions of its own")
    for key, option in data["options"].items():
        click.echo(f"  {key} = {option['default']!r}  {option['description']}".rstrip())
    click.echo("\nCapabilities")
    requires = data["capabilities"].pop("export_requires")
    for key, value in data["capabilities"].items():
        shown = (", ".join(value) or "none") if isinstance(value, tuple) else _yes(value)
        click.echo(f"  {key:<12} {shown}")
    for name, texts in requires.items():
        lacking = ", ".join(map(str, missing(texts)))
        if lacking:
            click.echo(f"  export {name} requires {lacking}")


def _yes(value: Any) -> str:
    return "yes" if value else "no"
