"""``quark run``: carry a recipe out."""

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


@click.command("run")
@recipe_argument
@set_option
@click.option("--quantizer", help="Use this backend in place of the recipe's.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="The run folder; by default one in the recipe's output folder.",
)
@click.option("--overwrite", is_flag=True, help="Replace a run of another recipe in --folder.")
@no_code_option
@json_option
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    quantizer: str | None,
    folder: Path | None,
    overwrite: bool,
    no_code: bool,
    as_json: bool,
) -> None:
    """Quantize a model as RECIPE says, evaluate it and write the results.

    Each finished stage is kept: after a crash or Ctrl-C the same command goes on where it
    stopped, and ends with the same results.
    """
    from quark_core.cli.progress import reporter
    from quark_core.recipe.run import run_recipe

    loaded = load(recipe, overrides, quantizer, no_code=no_code)
    with reporter() as report:
        result = run_recipe(loaded, folder=folder, overwrite=overwrite, reporter=report)
    if as_json:
        echo_json(
            {
                "folder": str(result.folder),
                "reused": list(result.reused),
                "exports": result.exports,
                **result.metrics,
            }
        )
    else:
        from quark_core.report.record import load_records
        from quark_core.report.tables import comparison_table, export_tables

        records = load_records(result.folder)
        draw(comparison_table(records))
        for record in records:
            for table in export_tables(record):
                draw(table)
        click.echo(f"report: {result.folder / 'report.html'}")
    result.require_gates()
