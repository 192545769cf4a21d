"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from quark_core.plan import Plan
from quark_core.report.format import bytes_text, metric_text, ratio_text, seconds_text
from quark_core.report.record import RunRecord
from quark_core.spec import ROLES

_LONGEST = 12
"""Longer tables of exports are left to the report."""


def comparison_table(records: Sequence[RunRecord]) -> Table:
    """Runs beside the float model: metrics, size, time."""
    metrics = list(dict.fromkeys(name for record in records for name in record.metrics))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model")
    for name in metrics:
        table.add_column(name, justify="right")
    table.add_column("size", justify="right")
    table.add_column("ratio", justify="right")
    table.add_column("quantize", justify="right")
    base = next((record for record in records if record.float_bytes), None)
    if base is not None:
        values = [metric_text(name, base.float_metrics.get(name)) for name in metrics]
        table.add_row("float", *values, bytes_text(base.float_bytes), "1.00", "")
    for record in records:
        if record.error is not None or (not record.metrics and record.status != "finished"):
            cells = [""] * (len(metrics) + 3)
            table.add_row(Text(f"{record.name} ({record.status})", style="red"), *cells)
            continue
        missed = {gate["metric"] for gate in record.gates if not gate["passed"]}
        table.add_row(
            record.name,
            *(
                Text(metric_text(name, record.metrics.get(name)), style="red" * (name in missed))
                for name in metrics
            ),
            bytes_text(record.quantized_bytes),
            ratio_text(record.quantized_bytes, record.float_bytes),
            seconds_text(record.seconds.get("quantize")),
        )
    return table


def plan_table(plan: Plan) -> Table:
    """What each layer becomes, and which rule decided; roles nothing happens to are left out."""
    roles = [role for role in ROLES if any(getattr(entry, role) for entry in plan.entries)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("layer", "type", "shape"):
        table.add_column(name, no_wrap=True)
    for name in (*roles, "decided by"):
        table.add_column(name, overflow="fold")
    for entry in plan.entries:
        specs = [getattr(entry, role) for role in roles]
        table.add_row(
            entry.name,
            entry.type,
            "x".join(str(side) for side in entry.shape or ()),
            *(str(spec) if spec is not None else "-" for spec in specs),
            Text(f"{entry.rule}: {entry.reason}" if entry.reason else entry.rule),
            style="dim" if not entry.quantized else "",
        )
    return table


def export_tables(record: RunRecord) -> list[Table]:
    """What a run's exports reported of themselves: their facts, and their short tables."""
    found = []
    for export in record.exports:
        if export["facts"]:
            facts = Table(box=None, pad_edge=False, show_header=False, title=export["title"])
            for name, value in export["facts"].items():
                facts.add_row(name, Text(str(value)))
            found.append(facts)
        for rows in export["tables"]:
            if len(rows["rows"]) > _LONGEST:
                continue
            table = Table(box=None, pad_edge=False, header_style="bold", title=rows["title"])
            for index, column in enumerate(rows["columns"]):
                table.add_column(column, justify="right" if index else "left")
            for row in rows["rows"]:
                table.add_row(*(Text(str(cell)) for cell in row))
            found.append(table)
    return found
