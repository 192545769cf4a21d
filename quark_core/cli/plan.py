"""``quark plan``: what would happen, before anything does."""

from __future__ import annotations

from pathlib import Path

import click

from quark_core.cli.output import (
    draw,
    echo_json,
    json_option,
    load,
    no_code_option,
    recipe_argument,
    set_option,
)


@click.command("plan")
@recipe_argument
@set_option
@click.option("--quantizer", help="Use this backend in place of the recipe's.")
@no_code_option
@json_option
def command(
    recipe: Path, overrides: tuple[str, ...], quantizer: str | None, no_code: bool, as_json: bool
) -> None:
    """Show what RECIPE would do to each layer, without doing it.

    One line a layer: what weight, input, output and bias become, and which rule decided. Nothing
    is calibrated or written.
    """
    from quark_core.recipe.run import plan_recipe

    loaded = load(recipe, overrides, quantizer, no_code=no_code)
    plan = plan_recipe(loaded)
    if as_json:
        echo_json(plan.to_dict())
        return
    from quark_core.report.tables import plan_table

    draw(plan_table(plan))
    for number, step in enumerate(plan.steps, start=1):
        click.echo(f"{number}. {step.name}" + (f": {step.reason}" if step.reason else ""))
    if plan.needs_calibration:
        click.echo("Calibration data are needed.")
    if not plan.quantized:
        click.echo("warning: nothing would be quantized, which `quark run` refuses", err=True)
    for warning in plan.warnings:
        click.echo(f"warning: {warning}", err=True)
