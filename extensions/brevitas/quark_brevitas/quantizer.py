"""BrevitasQuantizer: Brevitas's passes in the order that works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from quark_brevitas import (
    attention,
    computed,
    fusing,
    gguf_file,
    limits,
    low_rank,
    multihead,
    preparation,
    recurrent,
    rotation,
)
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.model import BrevitasModel, Prepared
from quark_brevitas.options import fused_option
from quark_brevitas.pipeline import Stage, stages
from quark_brevitas.planning import make_plan
from quark_brevitas.wrappers import path_of, show_layers
from quark_core.batch import Batch
from quark_core.errors import DataError
from quark_core.plan import Plan
from quark_core.quantizer import ModelQuantizer


class BrevitasQuantizer(ModelQuantizer[BrevitasConfig]):
    """Post-training quantization by Brevitas 0.13."""

    config_class = BrevitasConfig

    def plan(self, model: nn.Module, example: Batch | None = None) -> Plan:
        """Decide for each Linear and convolution, and order the passes.

        Raises:
            QuantizationError: The configuration needs a traced graph and the model has none, or
                asks for something that a layer's shape does not allow.
            ExportError: The tokenizer for GGUF files is missing, or another model's.
        """
        if self.config.gguf_tokenizer is not None:
            gguf_file.require_vocabulary(model, self.config.gguf_tokenizer)
        return make_plan(model, self.config, example)

    def require_export(self, name: str, plan: Plan, model: nn.Module) -> None:
        """Refuse forms whose files have no place for the formats of the plan."""
        from quark_brevitas.exports import require_fitting

        require_fitting(name, plan, model)

    def prepare(self, model: nn.Module, plan: Plan, example: Batch | None = None) -> Prepared:
        """Preprocess the model, and rewrite it unless passes over the float model come first."""
        # Brevitas's modules import each other in a circle, which only this one can enter first.
        import brevitas.graph  # noqa: F401

        counterparts: dict[str, str | None] = {}
        computed.settle(model)
        if self.config.backend != "fx":
            counterparts = dict.fromkeys(multihead.split_all(model))
        present = dict(model.named_modules())
        weighty = [entry.name for entry in plan.quantized if entry.weight]
        preparation.untie(model, [name for name in weighty if name in present])
        if any(step.name == "preprocess" for step in plan.steps):
            if self.config.equalize_iterations or self.config.channel_splitting:
                counterparts = {entry.name: None for entry in plan.entries}
            elif self.config.merge_bn:
                counterparts |= preparation.folded_into(model)
            model = preparation.preprocess(model, self.config)
        if self.config.backend != "fx":
            counterparts |= dict.fromkeys(recurrent.split_all(model, weighty))
        beside = example.beside(model) if example is not None else None
        model.eval()
        notes: list[str] = []
        if self.config.rotation is not None or rotation.works_on_graph(self.config):
            quantized = [entry.name for entry in plan.quantized]
            notes = rotation.transform(model, self.config, beside, quantized)
            counterparts = {entry.name: None for entry in plan.entries}
        sites = [entry.name for entry in plan.entries if entry.op == attention.OP]
        if sites:
            model = attention.put_sites(model, sites)
            counterparts |= dict.fromkeys(sites)
        tokenizer = self.config.gguf_tokenizer
        prepared = Prepared(model, plan, beside, counterparts, notes=notes, tokenizer=tokenizer)
        if beside is not None and (option := fused_option(self.config)):
            quantized = [entry.name for entry in plan.quantized]
            prepared.regions = fusing.required(model, beside, quantized, option)
            changed = fusing.members(prepared.regions)
            preparation.untie(model, changed)
            counterparts |= dict.fromkeys(name for name in changed if name in plan)
        if not any(stage.before for stage in self._stages(plan)):
            self._rewrite(prepared)
        return prepared

    def calibrate(self, prepared: Prepared, batch: Batch) -> None:
        """Give one batch to the pass under way.

        Raises:
            DataError: The batch has no samples, or holds NaN.
        """
        for leaf in batch.tensors():
            empty = leaf.ndim > 0 and not len(leaf)
            if empty or (leaf.is_floating_point() and bool(leaf.isnan().any())):
                raise DataError(
                    f"a calibration batch {'has no samples' if empty else 'holds NaN'}",
                    fix="Leave it out of the calibration data",
                )
        with preparation.quiet():
            if prepared.feed is not None:
                prepared.feed(batch)
            else:
                batch.run(prepared.module)

    def passes(self, prepared: Prepared, plan: Plan) -> Iterator[str]:
        """The stages that need data, in their order."""
        prepared.partial = self.partial
        for stage in self._stages(plan):
            if stage.rewrites and not prepared.rewritten:
                self._rewrite(prepared)
            if stage.run is not None:
                yield from stage.run(prepared)

    def convert(self, prepared: Prepared | BrevitasModel) -> BrevitasModel:
        """Hand the calibrated model out, or one that has been trained since.

        The module of a quantized model is trained like any other: quantizers pass gradients, and
        scales learn beside weights. Converting it afterwards puts it into eval mode and reads its
        numbers anew.

        Raises:
            QuantizationError: Training has left a weight or a scale that is not finite.
        """
        if isinstance(prepared, BrevitasModel):
            return prepared.trained()
        quantized = BrevitasModel(prepared)
        quantized.notes += quantized.clipped_biases()
        return quantized

    def load(
        self, model: nn.Module, directory: Path, example: Batch | None = None
    ) -> BrevitasModel:
        """Prepare the model again and load the saved state into it.

        Raises:
            QuantizationError: The files do not fit the model or the configuration.
        """
        if example is None:
            example = BrevitasModel.saved_example(directory)
        changes = (self.config.activation_equalization, self.config.awq, self.config.magr)
        changed = any(change is not None for change in changes)
        moved = "codes" if self.config.algorithm is not None else ""
        again = self._once()
        return BrevitasModel.load_state(
            again.prepare(model, make_plan(model, again.config, example), example),
            directory,
            again._rewrite,
            "weights" if changed else moved,
        )

    def _once(self) -> BrevitasQuantizer:
        """The same with branches of the right shapes, whose numbers come from a file."""
        given = self.config.low_rank
        if given is None or given.iterations == 1:
            return self
        low = given.model_copy(update={"iterations": 1})
        return BrevitasQuantizer(self.config.model_copy(update={"low_rank": low}))

    def _rewrite(self, prepared: Prepared) -> None:
        if self.config.low_rank is not None:
            plan, config, model = prepared.plan, self.config, prepared.module
            linear = [entry.name for entry in plan.quantized if entry.op == "linear"]
            paths = {name: path_of(model, name) for name in linear}
            low_rank.put_branches(
                model,
                paths,
                self.config.low_rank,
                lambda name, weight: preparation.rounded(weight, plan[name], config),
            )
            show_layers(model)
        hooks = preparation.hooks_of(prepared.module)
        state = prepared.module.named_parameters()
        frozen = {name for name, parameter in state if not parameter.requires_grad}
        if self.config.backend == "fx":
            rewritten = preparation.replace_graph(
                prepared.module, prepared.plan, self.config, prepared.example
            )
        else:
            rewritten = preparation.replace_layers(prepared.module, prepared.plan, self.config)
        preparation.require_layers(rewritten, prepared.plan)
        if self.config.backend == "fx" and prepared.example is not None:
            with preparation.quiet():
                limits.require_running(rewritten.eval(), prepared.example)
        preparation.put_hooks(rewritten, hooks)
        for name, parameter in rewritten.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name not in frozen)
        prepared.module, prepared.rewritten = rewritten.eval(), True

    def _stages(self, plan: Plan) -> list[Stage]:
        traced = "traced" if any(step.name == "preprocess" for step in plan.steps) else ""
        work = stages(self.config, plan.entries, traced)
        return [stage for stage in work if stage.name != "preprocess"]
