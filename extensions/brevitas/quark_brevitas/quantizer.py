"""BrevitasQuantizer: Brevitas's passes in the order that works."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from quark_brevitas import preparation
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.model import BrevitasModel, Prepared
from quark_core.batch import Batch
from quark_core.errors import QuantizationError
from quark_core.plan import Plan, PlanEntry, Step
from quark_core.quantizer import ModelQuantizer
from quark_core.selection import Decision, Target, select
from quark_core.targets import module_targets


class BrevitasQuantizer(ModelQuantizer[BrevitasConfig]):
    """Post-training quantization by Brevitas 0.13."""

    config_class = BrevitasConfig

    def plan(self, model: nn.Module, example: Batch | None = None) -> Plan:
        """Decide for each Linear and convolution, and order the passes.

        Raises:
            QuantizationError: The configuration needs a traced graph and the model has none.
        """
        found = [
            (target, module)
            for target, module in module_targets(model, preparation.OPS)
            if type(module) in preparation.OPS
        ]
        selection = select([target for target, _ in found], self.config)
        steps, warnings = self._steps(model)
        folded = model
        if steps[0].name == "preprocess" and self._wants_bias():
            # Folding BatchNorm gives biases to layers that have none yet.
            folded = preparation.preprocess(copy.deepcopy(model), self.config)
        entries = tuple(
            self._entry(target, module, selection.decisions[target.name], folded)
            for target, module in found
        )
        static = any(entry.input is not None and not entry.input.dynamic for entry in entries)
        warnings += tuple(
            f"{entry.name} {entry.reason}" for entry in entries if entry.reason.startswith("stays")
        )
        return Plan(
            entries,
            needs_calibration=static or self.config.bias_correction,
            steps=steps,
            unmatched=selection.unmatched,
            warnings=warnings,
        )

    def prepare(self, model: nn.Module, plan: Plan, example: Batch | None = None) -> Prepared:
        """Preprocess and rewrite the model."""
        counterparts: dict[str, str | None] = {}
        if any(step.name == "preprocess" for step in plan.steps):
            if self.config.equalize_iterations:
                counterparts = {entry.name: None for entry in plan.entries}
            elif self.config.merge_bn:
                counterparts = preparation.folded_into(model)
            model = preparation.preprocess(model, self.config)
        if self.config.backend == "fx":
            model = preparation.replace_graph(model, plan, self.config)
        else:
            model = preparation.replace_layers(model, plan)
        preparation.require_layers(model, plan)
        return Prepared(model.eval(), plan, example, counterparts)

    def calibrate(self, prepared: Prepared, batch: Batch) -> None:
        """Run one batch."""
        with preparation.quiet():
            batch.run(prepared.module)

    def passes(self, prepared: Prepared, plan: Plan) -> Iterator[str]:
        """Ranges first; then, with quantization on, the biases."""
        from brevitas.graph.calibrate import bias_correction_mode, calibration_mode

        if any(entry.input is not None and not entry.input.dynamic for entry in plan.entries):
            with calibration_mode(prepared.module):
                yield "calibrate"
        if self.config.bias_correction:
            with bias_correction_mode(prepared.module):
                yield "bias correction"

    def convert(self, prepared: Prepared) -> BrevitasModel:
        """Hand the calibrated model out."""
        return BrevitasModel(prepared)

    def load(self, model: nn.Module, directory: Path) -> BrevitasModel:
        """Prepare the model again and load the saved state into it.

        Raises:
            QuantizationError: The files do not fit the model or the configuration.
        """
        return BrevitasModel.load_state(self.prepare(model, self.plan(model)), directory)

    def _entry(
        self, target: Target, module: nn.Module, decision: Decision, folded: nn.Module
    ) -> PlanEntry:
        specs = decision.specs
        biased = folded.get_submodule(target.name).bias is not None
        granularity = specs["input"].granularity if specs["input"] is not None else None
        reason = "" if biased or specs["bias"] is None else "has no bias"
        if granularity is not None and granularity.kind == "token" and target.op != "linear":
            specs = dict.fromkeys(specs)
            reason = "stays float: token scales belong to Linear layers"
        return PlanEntry(
            name=target.name,
            type=type(module).__name__,
            op=target.op,
            shape=tuple(module.get_parameter("weight").shape),
            weight=specs["weight"],
            input=specs["input"],
            bias=specs["bias"] if biased else None,
            rule=decision.why,
            reason=reason,
        )

    def _wants_bias(self) -> bool:
        return self.config.bias is not None or any(rule.bias for rule in self.config.rules)

    def _steps(self, model: nn.Module) -> tuple[tuple[Step, ...], tuple[str, ...]]:
        config, steps, warnings = self.config, [], []
        wanted = preparation.must_trace(config, model)
        if wanted:
            problem = preparation.trace_problem(model)
            if problem and wanted != "merge_bn: true":
                raise QuantizationError(
                    f"{wanted} needs a model that can be traced",
                    where="quantizer",
                    cause=problem,
                    fix="Write backend: layerwise and equalize_iterations: 0",
                )
            if problem:
                warnings.append(f"BatchNorm stays apart: the model cannot be traced ({problem})")
            else:
                steps.append(Step("preprocess", f"{wanted}: done on the float weights, first"))
        steps.append(Step(f"{config.backend} rewriting", "float layers become Brevitas's"))
        if config.input is not None or any(rule.input is not None for rule in config.rules):
            steps.append(Step("calibrate", "input ranges, with quantization switched off"))
        if config.bias_correction:
            steps.append(Step("bias correction", "after ranges are known, with quantization on"))
        return tuple(steps), tuple(warnings)
