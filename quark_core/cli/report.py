"""``quark report``: look at a finished run again."""

from __future__ import annotations

from pathlib import Path

import click

from quark_core.cli.output import draw, echo_json, json_option


@click.command("report")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@json_option
def command(folder: Path, as_json: bool) -> None:
    """Show the run or comparison in FOLDER and write its HTML report anew."""
    from quark_core.recipe.folder import read_json
    from quark_core.report.html import write_report
    from quark_core.report.record import load_records
    from quark_core.report.tables import comparison_table

    records = load_records(folder)
    written = write_report(folder)
    if as_json:
        source = "comparison.json" if (folder / "comparison.json").exists() else "metrics.json"
        echo_json({"report": str(written), **read_json(folder / source)})
        return
    draw(comparison_table(records))
    click.echo(f"report: {written}")
