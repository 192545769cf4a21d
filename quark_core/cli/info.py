"""``quark info``: what one backend can do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, get_args, get_origin

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
        "options": _options(own),
    }
    if as_json:
        echo_json(data)
    else:
        _show(data)


def _options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Default, description, values and what is within, for each option by name."""
    from quark_core.problems import models_in
    from quark_core.spec import TensorSpec

    found = {}
    for key, field in fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        within: dict[str, Any] = {}
        for model in models_in(field.annotation):
            if model is not TensorSpec:
                tag = model.model_fields.get("name")
                inner = {k: v for k, v in model.model_fields.items() if k != "name"}
                within |= {f"{tag.default}." if tag else "": _options(inner)}
        found[key] = {
            "default": _plain(default),
            "required": field.is_required(),
            "description": field.description or "",
            "values": _choices(field.annotation),
            "within": {f"{tag}{k}": v for tag, part in within.items() for k, v in part.items()},
        }
    return found


def _plain(default: Any) -> Any:
    """A default as a recipe would write it."""
    from pydantic import BaseModel

    from quark_core.spec import TensorSpec

    if isinstance(default, TensorSpec):
        return str(default)
    if isinstance(default, BaseModel):
        return default.model_dump(mode="json", exclude_defaults=True)
    if isinstance(default, list | tuple):
        return [_plain(part) for part in default]
    return default if isinstance(default, bool | int | float | dict | None) else str(default)


def _choices(annotation: Any) -> list[Any]:
    """The values of a Literal, alone or in a union."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for part in get_args(annotation) for value in _choices(part)]


def _show_options(options: Mapping[str, Any], indent: str) -> None:
    for key, option in options.items():
        default = "required" if option["required"] else json.dumps(option["default"])
        values = f" ({', '.join(map(str, option['values']))})" if option["values"] else ""
        click.echo(f"{indent}{key}: {default}{values}  {option['description']}".rstrip())
        _show_options(option["within"], indent + "    ")


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
    _show_options(data["options"], "  ")
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
