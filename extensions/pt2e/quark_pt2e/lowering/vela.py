"""Vela's figures, read from the summaries it writes and prints."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import tempfile
from pathlib import Path
from typing import Any

from quark_core.errors import ExportError
from quark_pt2e.lowering import reporting

COLUMNS = (
    "cycles",
    "ms",
    "SRAM KiB",
    "off-chip KiB",
    "SRAM traffic bytes",
    "off-chip traffic bytes",
    "MACs",
    "NPU ops",
    "CPU ops",
)
_TEMPORARY = ("/tmp", "/var/tmp")  # noqa: S108 (folders within are made by tempfile)
_SUMS = {
    "cycles": ("cycles_total",),
    "SRAM traffic bytes": ("sram_total_bytes",),
    "off-chip traffic bytes": ("dram_total_bytes", "off_chip_flash_total_bytes"),
    "MACs": ("nn_macs",),
}
_PEAKS = {
    "SRAM KiB": ("sram_memory_used",),
    "off-chip KiB": ("dram_memory_used", "off_chip_flash_memory_used"),
}


def require() -> None:
    """Refuse to go on without Vela.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import ethosu.vela.vela  # noqa: F401
    except ImportError as error:
        raise reporting.missing("Vela", "quark-pt2e[ethos-u]", error) from error


def plain_folder() -> str:
    """A folder for temporary files whose path has no blanks, at which Vela's arguments are cut.

    Raises:
        ExportError: There is none.
    """
    for folder in (tempfile.gettempdir(), *_TEMPORARY):
        if not re.search(r"\s", folder) and Path(folder).is_dir():
            return folder
    raise ExportError(
        "Vela needs a temporary folder whose path has no blanks",
        where="export ethos-u",
        fix="Set TMPDIR to one",
    )


def figures(work: Path, flags: list[str], parts: int) -> dict[str, Any]:
    """Cycles, memory and traffic of all parts of a model together.

    Args:
        work: Where the lowering left each part's TOSA program, and the last part's summary.
        flags: Vela's flags.
        parts: Number of parts; a summary is overwritten by the next, so that several parts are
            compiled again one by one.
    """
    if parts == 1:
        return add([_summary(work / "output")])
    found = []
    for index, program in enumerate(sorted(work.glob("output_tag*.tosa"))):
        place = work / f"part{index}"
        place.mkdir()
        copied = place / "part.tosa"
        copied.write_bytes(program.read_bytes())
        _run([*flags, f"--output-dir={place}", str(copied)])
        found.append(_summary(place))
    return add(found)


def add(summaries: list[dict[str, str]]) -> dict[str, Any]:
    """One row for all parts: work and traffic add up, memory is the largest part's."""
    row: dict[str, Any] = {}
    for name, keys in _SUMS.items():
        row[name] = int(sum(float(part[key]) for part in summaries for key in keys))
    for name, keys in _PEAKS.items():
        row[name] = round(max(sum(float(part[key]) for key in keys) for part in summaries), 2)
    row["ms"] = f"{sum(float(part['inference_time']) for part in summaries) * 1000:.3f}"
    return row


def operators(printed: str, parts: int) -> dict[str, int]:
    """Operations on the NPU and on the CPU, from what Vela printed for each part."""
    found = {}
    for name, label in (("NPU ops", "NPU operators"), ("CPU ops", "CPU operators")):
        counts = [int(text) for text in re.findall(rf"{label} = (\d+)", printed)]
        found[name] = sum(counts[:parts])
    return found


def _run(arguments: list[str]) -> None:
    from ethosu.vela import vela

    with contextlib.redirect_stdout(io.StringIO()):
        vela.main(arguments)


def _summary(folder: Path) -> dict[str, str]:
    file = next(iter(sorted(folder.glob("*_summary_*.csv"))), None)
    if file is None:
        raise ExportError(f"Vela left no summary in {folder}", where="export ethos-u")
    with file.open(encoding="utf-8", newline="") as lines:
        return next(csv.DictReader(lines))
