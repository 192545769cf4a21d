"""``quark formats``: number formats by name, and what one makes of some values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from quark_core.cli.output import echo_json, echo_table, json_option


@click.group("formats", invoke_without_command=True)
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List number formats, or show what one makes of some values.

    Numbers within names are examples. Other spellings are understood as well: those of the OCP
    specification, torch, torchao, microxcaling, dmx (BFP16_64), MASE and AIMET.
    """
    if ctx.invoked_subcommand is not None:
        return
    rows = [_row(name) for name in _names()]
    if as_json:
        echo_json(rows)
        return
    echo_table(
        ("NAME", "FAMILY", "BITS", "BLOCK", "BITS AN ELEMENT"),
        [
            (
                row["name"],
                row["family"].replace("_", " "),
                str(row["bits"]),
                str(row["block"] or ""),
                f"{row['bits_per_element']:g}",
            )
            for row in rows
        ],
    )


@command.command("explain")
@click.argument("spec")
@click.option(
    "--values",
    default="0.1,0.5,1,1.5,3,-7,100",
    show_default=True,
    help="Numbers, separated by commas, as they follow one another along a block.",
)
@click.option("--profile", default="ocp", show_default=True, help="Whose numerics.")
@json_option
def explain(spec: str, values: str, profile: str, as_json: bool) -> None:
    """Show what SPEC makes of some values: scales, codes, results, errors, saturation.

    SPEC is a format as recipes spell it, such as mxfp4, int4/group:32/asym or mxfp8/scale:even.
    """
    from quark_core.registry import registry

    text, numbers = _canonical(spec), _numbers(values)
    plugin, found = registry().explain_format(text, numbers, profile)
    if as_json:
        echo_json({"spec": text, "plugin": plugin, **asdict(found)})
        return
    click.echo(f"{text} (by {plugin}, profile {profile})\n")
    width = max(len(title) for title, _ in found.facts)
    for title, fact in found.facts:
        click.echo(f"{title.ljust(width)}  {fact}")
    click.echo()
    echo_table(found.columns, found.rows)


def _names() -> tuple[str, ...]:
    from quark_core.formats import EXAMPLES

    return EXAMPLES


def _row(name: str) -> dict[str, Any]:
    from quark_core.formats import parse_format

    fmt = parse_format(name)
    return {
        "name": fmt.name,
        "family": fmt.family,
        "bits": fmt.bits,
        "block": fmt.block,
        "bits_per_element": fmt.bits_per_element,
    }


def _canonical(spec: str) -> str:
    from pydantic import ValidationError

    from quark_core.errors import ConfigError, Problem
    from quark_core.formats import parse_format
    from quark_core.spec import TensorSpec

    parse_format(spec.partition("/")[0])  # says what was meant, where a name is misspelled
    try:
        return str(TensorSpec.model_validate(spec))
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise ConfigError([Problem("spec", reason)]) from None


def _numbers(values: str) -> list[float]:
    try:
        found = [float(part) for part in values.split(",") if part.strip()]
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--values") from None
    if not found:
        raise click.BadParameter("name at least one number", param_hint="--values")
    return found
