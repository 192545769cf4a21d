"""``quark compare``: several recipes or backends on the same data."""

from __future__ import annotations

from pathlib import Path

import click

from quark_core.cli.output import draw, echo_json, json_option, load, no_code_option, set_option
from quark_core.errors import ExitCode


@click.command("compare")
@click.argument(
    "recipes",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option(
    "--quantizer",
    "quantizers",
    multiple=True,
    help="Run each recipe with this backend. Repeatable.",
)
@set_option
@click.option("--name", default="comparison", help="Name of the comparison's folder.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where that folder lies; by default the first recipe's output folder.",
)
@no_code_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    recipes: tuple[Path, ...],
    quantizers: tuple[str, ...],
    overrides: tuple[str, ...],
    name: str,
    output: Path | None,
    no_code: bool,
    as_json: bool,
) -> None:
    """Run several RECIPES, or one with several --quantizer, and compare them.

    All must have the same model, data and evaluation, so that they can be compared; the float
    model is evaluated once. A recipe that fails is shown as such, and the others go on.
    """
    from quark_core.analysis.compare import compare
    from quark_core.cli.progress import reporter
    from quark_core.recipe.folder import read_json

    loaded = [
        load(recipe, overrides, quantizer, no_code=no_code)
        for recipe in recipes
        for quantizer in (quantizers or (None,))
    ]
    with reporter() as report:
        folder = compare(loaded, output, name, reporter=report)
    found = read_json(folder / "comparison.json")
    if as_json:
        echo_json({"folder": str(folder), **found})
    else:
        from quark_core.report.record import load_records
        from quark_core.report.tables import comparison_table

        draw(comparison_table(load_records(folder)))
        for key, value in found["hashes"].items():
            click.echo(f"{key:<12} {value or 'none'}")
        click.echo(f"report: {folder / 'report.html'}")
    for run in found["runs"]:
        if run["error"]:
            click.echo(f"error: {run['name']}: {run['error']}", err=True)
    if any(run["error"] for run in found["runs"]):
        ctx.exit(ExitCode.RUN_FAILED)
    if any(not gate["passed"] for run in found["runs"] for gate in run["gates"]):
        for run in found["runs"]:
            for gate in run["gates"]:
                if not gate["passed"]:
                    click.echo(
                        f"error: {run['name']}: {gate['metric']} is {gate['value']:.4g}, "
                        f"required is {gate['require']}",
                        err=True,
                    )
        ctx.exit(ExitCode.ACCURACY_MISSED)
