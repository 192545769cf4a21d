"""Carrying out a recipe, stage by stage, so that nothing finished is ever done twice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quark_core.errors import AccuracyGateError
from quark_core.execution import Reporter, Silent
from quark_core.plan import Plan
from quark_core.recipe import hashing, manifest
from quark_core.recipe.folder import (
    RunFolder,
    copy_stage,
    find_finished,
    open_folder,
    read_json,
)
from quark_core.recipe.load import LoadedRecipe
from quark_core.recipe.stages import EXPORTS, NOTES, Inputs, Stages
from quark_core.registry import registry

STAGES = ("float", "plan", "quantize", "evaluate", "export", "report")


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: The run folder.
        metrics: What metrics.json holds.
        exports: Metrics of each export that measured itself.
        reused: Stages that were found finished.
    """

    folder: Path
    metrics: dict[str, Any]
    exports: dict[str, dict[str, float]]
    reused: tuple[str, ...]

    @property
    def missed(self) -> list[dict[str, Any]]:
        """The gates that were missed."""
        return [gate for gate in self.metrics["gates"] if not gate["passed"]]

    def require_gates(self) -> None:
        """Refuse a run that missed a gate.

        Raises:
            AccuracyGateError: Names each, with the value reached.
        """
        if self.missed:
            words = [
                f"{gate['metric']} is {float(gate['value']):.4g}, required is {gate['require']}"
                for gate in self.missed
            ]
            raise AccuracyGateError(
                "; ".join(words),
                where="evaluate.require",
                fix=f"The results are in {self.folder}",
            )


def folder_for(loaded: LoadedRecipe, root: Path | None = None) -> Path:
    """Where a recipe's run lies: a folder named after it and what it says."""
    return (root or Path(loaded.recipe.output)) / (
        f"{loaded.name}-{manifest.recipe_key(loaded)[:8]}"
    )


def plan_recipe(loaded: LoadedRecipe) -> Plan:
    """What a recipe would do to each layer, without calibrating or writing anything."""
    return Inputs(loaded).plan


def run_recipe(
    loaded: LoadedRecipe,
    *,
    folder: Path | None = None,
    root: Path | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    reuse: tuple[Path, ...] = (),
) -> RunResult:
    """Carry a recipe out; finished stages of an earlier attempt are not done again.

    Args:
        loaded: The recipe.
        folder: The run folder; by default one under ``root``, named after the recipe.
        root: Folder of run folders; by default the recipe's ``output``.
        overwrite: Replace a run of another recipe found in ``folder``.
        reporter: Told how the run goes.
        reuse: Further folders of run folders in which finished stages may be found.

    Raises:
        QuarkError: As the stages do. Finished stages stay; the same call resumes.
    """
    path = (folder or folder_for(loaded, root)).resolve()
    with open_folder(path, manifest.fresh(loaded), overwrite=overwrite) as run_folder:
        roots = [path.parent, *reuse]
        return _Run(loaded, run_folder, roots, reporter or Silent()).run()


class _Run:
    def __init__(
        self, loaded: LoadedRecipe, folder: RunFolder, roots: list[Path], reporter: Reporter
    ) -> None:
        self.loaded, self.folder, self.roots, self.reporter = loaded, folder, roots, reporter
        self.inputs = Inputs(loaded)
        self.stages = Stages(self.inputs, folder.path, reporter)
        self.reused: list[str] = []

    def run(self) -> RunResult:
        self.folder.manifest["status"] = "running"
        self.folder.write_manifest()
        self.reporter.run_started(self.loaded.name)
        self._emit("quark_run_started", recipe=self.loaded.data, folder=self.folder.path)
        try:
            self.folder.manifest["hashes"] = self.inputs.hashes
            keys = self._keys()
            for stage in STAGES:
                self._stage(stage, keys[stage])
                if stage == "plan":
                    for warning in read_json(self.folder.path / "plan.json")["warnings"]:
                        self._warn(warning)
                if stage == "quantize":
                    for note in read_json(self.folder.path / NOTES):
                        self.reporter.note(note)
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            self.folder.manifest["status"] = "interrupted" if stopped else "failed"
            self.folder.write_manifest()
            self._emit("quark_run_failed", folder=self.folder.path, error=error)
            raise
        metrics = read_json(self.folder.path / "metrics.json")
        self.folder.manifest["status"] = "finished"
        self._emit("quark_run_finished", folder=self.folder.path, metrics=metrics)
        self.folder.write_manifest()
        exports = read_json(self.folder.path / EXPORTS)
        return RunResult(self.folder.path, metrics, exports, tuple(self.reused))

    def _keys(self) -> dict[str, str]:
        """A hash of everything each stage depends on."""
        recipe, inputs = self.loaded.recipe, self.inputs
        config = self.loaded.config.model_dump(mode="json")
        evaluate = recipe.evaluate.model_dump(mode="json", exclude={"require"})
        hashes = {**inputs.hashes, "device": recipe.device}
        model = {key: hashes[key] for key in ("model", "code", "device")}
        own_code = manifest.code_key(inputs.entry)
        host_code = hashing.of_package("quark_core")
        keys = {
            "float": hashing.of_data(
                [model, hashes["evaluation"], evaluate, host_code, manifest.host_versions()]
            ),
            "plan": hashing.of_data([model, config, own_code, hashes["calibration"]]),
        }
        keys["quantize"] = hashing.of_data([keys["plan"], "quantize"])
        keys["evaluate"] = hashing.of_data(
            [keys["quantize"], keys["float"], recipe.evaluate.model_dump(mode="json")]
        )
        keys["export"] = hashing.of_data([keys["quantize"], list(recipe.export)])
        keys["report"] = hashing.of_data([keys["evaluate"], keys["export"]])
        return keys

    def _stage(self, stage: str, key: str) -> None:
        if self.folder.is_finished(stage, key):
            self._reuse(stage, "finished before")
            return
        # A report tells of its own run, so that of another run is of no use.
        found = stage != "report" and find_finished(self.roots, stage, key, self.folder.path)
        if found:
            with self.folder.work(stage) as place:
                self.folder.commit(stage, place, copy_stage(found, stage, place))
            self._reuse(stage, f"taken from {found.name}")
            return
        self.reporter.stage_started(stage)
        self._emit("quark_stage_started", stage=stage, folder=self.folder.path)
        with self.folder.work(stage) as place:
            with manifest.measure() as measured:
                self.stages.do(stage, place, self.folder.partial(stage, key))
            record = {
                "key": key,
                "seconds": round(measured.seconds, 3),
                "peak_memory_bytes": measured.peak_memory_bytes,
                "finished": manifest.now(),
            }
            self.folder.commit(stage, place, record)
        self.reporter.stage_finished(stage, measured.seconds)
        self._emit("quark_stage_finished", stage=stage, folder=self.folder.path, record=record)

    def _reuse(self, stage: str, note: str) -> None:
        self.reused.append(stage)
        self.reporter.stage_finished(stage, 0.0, note)

    def _emit(self, event: str, **arguments: Any) -> None:
        for warning in registry().emit(event, **arguments):
            self._warn(warning)

    def _warn(self, text: str) -> None:
        if text not in self.folder.manifest["warnings"]:
            self.folder.manifest["warnings"].append(text)
            self.reporter.warn(text)
