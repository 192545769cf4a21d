"""Writing a quantized model: the host's own forms, the backend's, and what plugins bring."""

from __future__ import annotations

from pathlib import Path

from quark_core.batch import Batch
from quark_core.errors import ExportError, QuarkError
from quark_core.quantized import QuantizedModel
from quark_core.registry import Entry, registry


def report_file(written: Path) -> Path:
    """Where an export may say something of itself, for the run's report.

    ``report.json`` in the folder it wrote, or ``NAME.report.json`` beside the file. All of it is
    optional: ``title``; ``facts``, texts by name; ``tables``, each with ``title``, ``columns`` and
    ``rows`` of texts; ``metrics``, numbers by name for exports.json, shown where there are no
    facts and tables.
    """
    if written.is_dir():
        return written / "report.json"
    return written.with_name(f"{written.name}.report.json")


def write_export(
    name: str, quantized: QuantizedModel, folder: Path, example: Batch | None, backend: Entry
) -> Path:
    """Write a model in the form ``name`` into ``folder``, and return the path.

    The backend's own form of that name comes before the host's.

    Args:
        name: As the recipe's ``export`` lists it.
        quantized: The model.
        folder: Where to write; the file or folder is called after the form.
        example: One batch, for forms that must trace.
        backend: The backend that made the model.

    Raises:
        ExportError: The model cannot be written so; nothing is left behind.
        UnknownNameError: Nobody knows the form.
    """
    try:
        if name in backend.spec.capabilities.exports:
            return quantized.export(name, folder / name)
        entry = registry().get("exporter", name)
        path = folder / f"{name}{entry.spec.suffix}"
        written: Path = registry().resolve(entry, entry.spec.export)(quantized, path, example)
    except QuarkError:
        raise
    except Exception as error:
        raise ExportError(
            f"writing {name!r} raised {type(error).__name__}",
            where=f"backend {backend.spec.name}",
            cause=str(error).splitlines()[0][:200] if str(error) else None,
            fix="Choose another form; `quark info` lists the backend's own",
        ) from error
    return written
