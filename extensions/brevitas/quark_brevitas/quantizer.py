"""BrevitasQuantizer: Brevitas's passes in the order that works."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
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
from quark_brevitas.wrappers import path_of, show_layers
from quark_core.batch import Batch
from quark_core.errors import DataError, QuantizationError
from quark_core.plan import Plan, PlanEntry, Step
from quark_core.quantizer import ModelQuantizer
from quark_core.selection import Decision, Target, select
from quark_core.targets import io_roles, module_targets

_NOT_APART = "stays float: backend: layerwise takes the common kinds apart into Linear layers"
_UNTRACED = {
    "backend": "backend: layerwise",
    "equalize_iterations": "equalize_iterations: 0",
    "channel_splitting": "channel_splitting: 0",
    "rotation.mode": "rotation.mode: fused",
    "activation_equalization.mode": "activation_equalization.mode: fused, or layerwise",
    "attention.mode": "attention.mode: functional",
}
"""What does without a traced graph, by the option that needs one."""


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
        return self._plan(model, example)

    def _plan(self, model: nn.Module, example: Batch | None) -> Plan:
        limits.require_whole(model)
        known = module_targets(model, preparation.OPS)
        computed.require_weights(known, preparation.OPS)
        if computed.has_parametrizations(model):
            model = copy.deepcopy(model)
            computed.settle(model)
            known = module_targets(model, preparation.OPS)
        if self._splits(model):
            model = copy.deepcopy(model)
            multihead.split_all(model)
        traced, graph, warnings = self._traced(model)
        if self.config.backend == "fx":
            limits.require_single_calls(graph)
        sites = self._sites(model, example, traced)
        if self._splits(model):
            # Only now: a tracer takes them whole, and could not follow their steps.
            warnings += self._first_steps(recurrent.split_all(model))
            if graph is not None:
                recurrent.split_all(graph)
        known = module_targets(model, preparation.OPS)
        found = [item for item in known if type(item[1]) in preparation.OPS]
        selection = select([*self._placed(found, model, example), *sites], self.config)
        called = set(dict(graph.named_modules())) if graph is not None else None
        # Folding BatchNorm gives biases to layers that have none yet.
        folds = graph is not None and self.config.merge_bn and self._wants_bias()
        folded = preparation.fold_norms(graph) if folds else model
        entries = tuple(
            self._entry(target, module, selection.decisions[target.name], folded)
            if called is None or target.name in called
            else _left_out(target, module, "float: the model never calls it")
            for target, module in found
        )
        entries += tuple(
            _left_out(target, module, why) for target, module in known if (why := _unknown(module))
        )
        entries += tuple(self._site(target, selection.decisions[target.name]) for target in sites)
        entries += _whole(model)
        limits.require(model, entries, self.config)
        on_graph = rotation.works_on_graph(self.config) and not traced
        if rotation.works_on_graph(self.config) and (traced or example is not None):
            seen = preparation.preprocess(copy.deepcopy(model), self.config) if traced else model
            beside = example.beside(model) if example is not None else None
            rotation.require_regions(seen, self.config, beside)
        if example is not None and (option := fused_option(self.config)):
            quantized = [entry.name for entry in entries if entry.quantized]
            fusing.required(model, example.beside(model), quantized, option)
        found_stages = stages(self.config, entries, traced)
        return Plan(
            entries,
            needs_calibration=on_graph
            or self.config.attention is not None
            or any(stage.run is not None for stage in found_stages),
            steps=tuple(Step(stage.name, stage.reason) for stage in found_stages),
            unmatched=selection.unmatched,
            warnings=(*warnings, *limits.warnings(entries, self.config)),
        )

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
        if self._splits(model):
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
            again.prepare(model, again._plan(model, example), example),
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

    def _entry(
        self, target: Target, module: nn.Module, decision: Decision, folded: nn.Module
    ) -> PlanEntry:
        if target.op == "embedding":
            return self._embedding(target, module, decision)
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

    def _embedding(self, target: Target, module: nn.Module, decision: Decision) -> PlanEntry:
        """An embedding's weight, if a rule asks for it: Brevitas's own examples leave it float."""
        rule = None if decision.rule is None else self.config.rules[decision.rule]
        spec = decision.specs["weight"]
        reason = ""
        if rule is None or (not rule.skip and "weight" not in rule.model_fields_set):
            spec, reason = None, "float unless a rule for it gives a weight"
        elif spec is not None and module.max_norm is not None:
            spec, reason = None, "stays float: max_norm changes its weight at run time"
        shape = tuple(module.get_parameter("weight").shape)
        kind = type(module).__name__
        return PlanEntry(
            target.name, kind, target.op, shape, weight=spec, rule=decision.why, reason=reason
        )

    def _placed(
        self, found: list[tuple[Target, nn.Module]], model: nn.Module, example: Batch | None
    ) -> list[Target]:
        """Targets that know whether they are first or last, if a rule asks."""
        targets = [target for target, _ in found]
        if not any(rule.io for rule in self.config.rules):
            return targets
        if example is None:
            raise DataError(
                "a rule with io runs one batch to find the first and last layers",
                where="quantizer.rules",
                fix="Give data.calibration, or select those layers by name",
            )
        roles = io_roles(model, [target.name for target in targets], example)
        return [replace(target, io=roles[target.name]) for target in targets]

    def _splits(self, model: nn.Module) -> bool:
        """Whether there is attention to take apart; fx could not see through what comes of it."""
        return self.config.backend != "fx" and any(
            multihead.can_split(module) or recurrent.can_split(module) for module in model.modules()
        )

    def _first_steps(self, layers: list[str]) -> tuple[str, ...]:
        """A warning about Brevitas's own algorithms, which look at a layer's first call only."""
        if not layers or getattr(self.config.algorithm, "engine", "fast") == "fast":
            return ()
        return (
            f"engine: brevitas looks at the first step of a sequence only in {', '.join(layers)}; "
            "engine: fast looks at all",
        )

    def _sites(self, model: nn.Module, example: Batch | None, traced: str) -> list[Target]:
        """Where attention is called, if the configuration asks for it."""
        if self.config.attention is None:
            return []
        beside = example.beside(model) if example is not None else None
        if traced:
            model = preparation.preprocess(copy.deepcopy(model), self.config)
        names = attention.sites(model, beside)
        if not names and (traced or beside is not None):
            raise QuantizationError(
                "the model never calls scaled_dot_product_attention",
                where="attention",
                fix="Leave attention out, or load the model with attn_implementation='sdpa'",
            )
        types = ("ScaledDotProductAttention",)
        return [Target(name, types, attention.OP) for name in names]

    def _site(self, target: Target, decision: Decision) -> PlanEntry:
        spec = None if decision.skip else self.config.attention_spec
        return PlanEntry(target.name, target.types[0], target.op, input=spec, rule=decision.why)

    def _wants_bias(self) -> bool:
        return self.config.bias is not None or any(rule.bias for rule in self.config.rules)

    def _traced(self, model: nn.Module) -> tuple[str, Any, tuple[str, ...]]:
        """What needs a traced graph, the graph if the model has one, and warnings if not."""
        wanted = preparation.must_trace(self.config, model)
        if not wanted:
            return "", None, ()
        try:
            return wanted, preparation.trace(model), ()
        except Exception as error:  # noqa: BLE001 (tracing runs the user's forward)
            lines = str(error).strip().splitlines()
            problem = f"{type(error).__name__}: {lines[0] if lines else ''}"
        if wanted != "merge_bn: true":
            raise QuantizationError(
                f"{wanted.removesuffix(', merge_bn: true')} needs a model that can be traced",
                where="quantizer",
                cause=problem,
                fix=f"Write {_UNTRACED[wanted.split(':')[0]]}",
            )
        return "", None, (f"BatchNorm stays apart: the model cannot be traced ({problem})",)


def _whole(model: nn.Module) -> tuple[PlanEntry, ...]:
    """Modules with several weights that nobody has taken apart."""
    return tuple(
        PlanEntry(name, type(module).__name__, type(module).__name__.lower(), reason=_NOT_APART)
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase)
    )


def _unknown(module: nn.Module) -> str:
    """Why Brevitas leaves a class derived from one of its layers; empty for the layers."""
    if type(module) in preparation.OPS:
        return ""
    if hasattr(module, "weight_quant"):
        return "as it is: it is one of Brevitas's quantized layers already"
    base = next(kind.__name__ for kind in type(module).__mro__ if kind in preparation.OPS)
    return f"float: Brevitas replaces {base}, but no class derived from it"


def _left_out(target: Target, module: nn.Module, why: str) -> PlanEntry:
    """A layer that is missing from the traced graph, or that Brevitas does not know."""
    shape = tuple(getattr(module, "weight", torch.empty(0)).shape)
    # Nobody expects embeddings to be quantized who has not written a rule for them.
    reason = why if target.op == "embedding" else f"stays {why}"
    return PlanEntry(target.name, type(module).__name__, target.op, shape=shape, reason=reason)
