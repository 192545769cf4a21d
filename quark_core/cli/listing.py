"""``quark list``: what is installed, without importing any backend's library."""

from __future__ import annotations

from typing import Any

import click

from quark_core.cli.output import echo_json, echo_table, json_option

_KINDS = {
    "quantizers": "quantizer",
    "exporters": "exporter",
    "model-sources": "model_source",
    "data-sources": "data_source",
    "metrics": "metric",
}


@click.command("list")
@click.argument("kind", type=click.Choice(list(_KINDS)), default="quantizers")
@click.option("--timing", is_flag=True, help="Show how long each plugin takes to import.")
@json_option
def command(kind: str, timing: bool, as_json: bool) -> None:
    """List the backends that are installed, and what is wrong with any.

    KIND is quantizers (the default), exporters, model-sources, data-sources or metrics. Plugins
    that cannot be used are listed with the reason and what to do about it.
    """
    from quark_core.registry import registry

    found = registry()
    entries = found.entries(_KINDS[kind])  # type: ignore[arg-type]
    rows = [_entry(entry) for entry in entries]
    named = {(row["distribution"], row["plugin"]) for row in rows}
    faults = [_fault(record) for record in found.plugins if record.error]
    if as_json:
        echo_json({"entries": rows, "faults": faults, "timing": _times(found.plugins)})
        return
    echo_table(
        ("NAME", "FROM", "STATE", "SUMMARY"),
        [(row["name"], row["from"], row["state"], row["summary"]) for row in rows],
    )
    for row in rows:
        for line in row["notes"]:
            click.echo(f"\n{row['name']} ({row['from']}): {line}")
        if row["missing"]:
            click.echo(f"  Run: {row['install']}")
    if kind == "exporters":
        click.echo("\nThese are for any backend; `quark info NAME` lists those of one alone.")
    for fault in faults:
        listed = (fault["distribution"], fault["plugin"]) in named
        word = "" if listed and fault["state"] == "conflict" else f"is {fault['state']}: "
        click.echo(f"\n{fault['plugin']} ({fault['from']}) {word}{fault['error']}.")
        click.echo(f"  {fault['fix']}.")
    if timing:
        click.echo()
        times = _times(found.plugins)
        echo_table(
            ("PLUGIN", "FROM", "IMPORT"),
            [(t["plugin"], t["from"], f"{t['milliseconds']:.1f} ms") for t in times],
        )


def _entry(entry: Any) -> dict[str, Any]:
    from quark_core.registry import State
    from quark_core.registry.requirements import missing

    record, spec = entry.plugin, entry.spec
    found = missing(getattr(spec, "requires", ()))
    lacking = [str(requirement) for requirement in found]
    state = "ready"
    notes = list(record.notes)
    if record.state is State.CONFLICT:
        state = "conflict"
    elif lacking:
        state = "missing"
        notes.append("requires " + ", ".join(lacking))
    return {
        "name": spec.name,
        "plugin": record.name,
        "distribution": record.distribution,
        "version": record.version,
        "from": f"{record.distribution} {record.version}",
        "state": state,
        "summary": spec.summary,
        "missing": lacking,
        "install": " ".join(["pip install", *(f'"{one.text}"' for one in found)]) if found else "",
        "notes": notes,
    }


def _fault(record: Any) -> dict[str, str]:
    return {
        "plugin": record.name,
        "distribution": record.distribution,
        "from": f"{record.distribution} {record.version}",
        "state": str(record.state),
        "error": record.error.rstrip("."),
        "fix": record.fix.rstrip("."),
    }


def _times(records: list[Any]) -> list[dict[str, Any]]:
    timed = [record for record in records if record.seconds is not None]
    return [
        {
            "plugin": record.name,
            "from": f"{record.distribution} {record.version}",
            "milliseconds": round(record.seconds * 1000, 3),
        }
        for record in sorted(timed, key=lambda record: -record.seconds)
    ]
