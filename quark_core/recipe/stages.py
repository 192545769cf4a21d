"""The stages of a run: each writes its files into a folder it is given, and nothing else."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quark_core import _checks
from quark_core.batch import Batch, as_batch
from quark_core.errors import DataError, MissingDependencyError
from quark_core.execution import Reporter
from quark_core.export import report_file, write_export
from quark_core.export.encodings import write_encodings
from quark_core.plan import Plan
from quark_core.quantized import QuantizedModel
from quark_core.quantizer import ModelQuantizer
from quark_core.recipe import hashing
from quark_core.recipe.evaluate import Evaluation
from quark_core.recipe.folder import read_json, write_json
from quark_core.recipe.load import LoadedRecipe
from quark_core.registry import registry

if TYPE_CHECKING:
    import torch

SAVED = "quantized"
"""Folder in the run folder that holds the backend's own saved model."""
NOTES = "notes.json"
"""What a backend noted while it quantized."""
EXPORTS = "exports.json"
"""Metrics of the exports, by their names."""


class Inputs:
    """What the stages work on; loaded when first needed.

    Attributes:
        loaded: The recipe.
        entry: The backend.
    """

    def __init__(self, loaded: LoadedRecipe) -> None:
        self.loaded = loaded
        self.entry = registry().get("quantizer", loaded.config.name)

    @cached_property
    def model(self) -> torch.nn.Module:
        """The float model, on the recipe's device."""
        return self.loaded.load_model().to(_device(self.loaded.recipe.device))

    @cached_property
    def calibration(self) -> Any:
        """The calibration batches, or None."""
        return self.loaded.load_data("calibration")

    @cached_property
    def evaluation(self) -> Any:
        """The evaluation batches, or None."""
        return self.loaded.load_data("evaluation")

    @cached_property
    def quantizer(self) -> ModelQuantizer[Any]:
        """The backend's quantizer, configured."""
        return registry().quantizer_class(self.loaded.config.name)(self.loaded.config)

    @cached_property
    def example(self) -> Batch | None:
        """One batch to trace or probe with, or None without any data."""
        for data in (self.calibration, self.evaluation):
            for item in data or ():
                return as_batch(item)
        return None

    @cached_property
    def plan(self) -> Plan:
        """The backend's plan, of which the exports that are asked for can hold the result."""
        plan = self.quantizer.make_plan(self.model, self.example)
        for name in self.loaded.recipe.export:
            self.quantizer.require_export(name, plan, self.model)
        return plan

    @cached_property
    def hashes(self) -> dict[str, str | None]:
        """Content hashes of model, user code and data."""
        config, evaluate = self.loaded.config, self.loaded.recipe.evaluate
        return {
            "model": hashing.of_model(self.model),
            "code": hashing.of_files(self.loaded.code_files()),
            "calibration": _hash(self.calibration, config.calibration.batches),
            "evaluation": _hash(self.evaluation, evaluate.batches),
        }


class Stages:
    """The work of each stage.

    Args:
        inputs: The recipe, its model and data.
        folder: The run folder, with the files of finished stages.
        reporter: Told how far the work is.
    """

    def __init__(self, inputs: Inputs, folder: Path, reporter: Reporter) -> None:
        self._inputs, self._folder, self._reporter = inputs, folder, reporter
        self._made: QuantizedModel | None = None

    def do(self, stage: str, place: Path, partial: Path) -> None:
        """Do one stage.

        Args:
            stage: Its name.
            place: Folder for what it writes.
            partial: Folder for finished parts, which the next attempt finds again.
        """
        self._partial = partial
        getattr(self, f"_{stage}")(place)

    @cached_property
    def _evaluation(self) -> Evaluation | None:
        data = self._inputs.evaluation
        if data is None:
            if self._inputs.loaded.recipe.evaluate.metrics:
                raise DataError(
                    "metrics are asked for, but there are no evaluation data",
                    where="data.evaluation",
                    fix="Give data.evaluation, or drop evaluate.metrics",
                )
            return None
        return Evaluation(self._inputs.loaded, data, self._reporter)

    def _float(self, place: Path) -> None:
        found = self._evaluation.of_float(self._inputs.model) if self._evaluation else {}
        write_json(place / "float.json", found)

    def _plan(self, place: Path) -> None:
        write_json(place / "plan.json", self._inputs.plan.to_dict())

    def _quantize(self, place: Path) -> None:
        quantized = self._inputs.quantizer.quantize(
            self._inputs.model,
            self._inputs.calibration,
            progress=self._reporter.progress,
            partial=self._partial,
        )
        self._made = quantized
        write_encodings(quantized, place)
        write_json(place / NOTES, quantized.notes)
        if self._inputs.entry.spec.capabilities.save_load:
            (place / SAVED).mkdir()
            quantized.save(place / SAVED)

    def _evaluate(self, place: Path) -> None:
        quantized, model = self._quantized(), self._inputs.model
        evaluate = self._inputs.loaded.recipe.evaluate
        metrics = self._evaluation.of_quantized(quantized, model) if self._evaluation else {}
        table = _checks.tensor_table(model).values()
        write_json(
            place / "metrics.json",
            {
                "float": read_json(self._folder / "float.json"),
                "quantized": metrics,
                "size": {
                    "float_bytes": sum(_elements(shape) * size for shape, size in table),
                    "quantized_bytes": quantized.size_bytes(),
                },
                "layers": self._evaluation.layers(quantized, model) if self._evaluation else [],
                "gates": [
                    {
                        "metric": name,
                        "require": str(gate),
                        "value": metrics[name],
                        "passed": gate.holds(metrics[name]),
                    }
                    for name, gate in evaluate.require.items()
                ],
            },
        )

    def _export(self, place: Path) -> None:
        names = self._inputs.loaded.recipe.export
        if names:
            quantized = self._quantized()
            quantized.float_model = self._inputs.model
            quantized.evaluation = self._inputs.evaluation
        measured = {}
        for name in names:
            (place / "export").mkdir(exist_ok=True)
            self._reporter.progress(f"export {name}", 0, None)
            written = write_export(
                name, self._quantized(), place / "export", self._inputs.example, self._inputs.entry
            )
            report = report_file(written)
            if report.exists():
                measured[name] = read_json(report).get("metrics", {})
        write_json(place / EXPORTS, measured)

    def _report(self, place: Path) -> None:
        from quark_core.report.html import write_report

        write_report(self._folder, place / "report.html")

    def _quantized(self) -> QuantizedModel:
        """The quantized model: just made, loaded, or where the backend cannot, made again."""
        if self._made is None:
            if self._inputs.entry.spec.capabilities.save_load:
                model = self._inputs.model
                self._made = self._inputs.quantizer.restore(
                    model, self._folder / SAVED, self._inputs.example
                )
            else:
                self._made = self._inputs.quantizer.quantize(
                    self._inputs.model, self._inputs.calibration, progress=self._reporter.progress
                )
        return self._made


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise MissingDependencyError(
            f"device {name} is asked for, but torch sees no GPU",
            where="device",
            fix="Write device: cpu or auto, or install a CUDA build of torch",
        )
    return torch.device(name)


def _hash(data: Any, limit: int | None) -> str | None:
    return None if data is None else hashing.of_batches(data, limit)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
