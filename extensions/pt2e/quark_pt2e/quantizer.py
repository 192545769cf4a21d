"""Pt2eQuantizer: export, annotate, observe, calibrate, convert, for any PT2E quantizer."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import fx, nn
from torchao.quantization.pt2e.quantize_pt2e import (
    convert_pt2e,
    prepare_pt2e,
    prepare_qat_pt2e,
)
from torchao.quantization.pt2e.quantizer import Quantizer

from quark_core.batch import Batch
from quark_core.errors import QuantizationError
from quark_core.plan import Plan, Step
from quark_core.quantizer import ModelQuantizer
from quark_core.selection import select
from quark_pt2e import findings
from quark_pt2e.config.base import Pt2eConfig
from quark_pt2e.graph import coverage, training
from quark_pt2e.graph.branching import BranchCounter, convert_all, prepare_all
from quark_pt2e.graph.capture import (
    Captured,
    capture,
    require_supported,
)
from quark_pt2e.graph.naming import Namer, Site, branches, scope_names
from quark_pt2e.graph.sizes import require_any_size
from quark_pt2e.model import Layer, Pt2eModel
from quark_pt2e.module import GraphRunner, fingerprint
from quark_pt2e.observing import Ranges, observers
from quark_pt2e.trainable import TrainableModel, TrainableRunner

ConfigT = TypeVar("ConfigT", bound=Pt2eConfig)
Export = Callable[[Pt2eModel, Path], Path]


@dataclass
class Observed:
    """A graph with observers in it, on its way through calibration.

    Attributes:
        runner: Calls the graph on batches of any size.
        captured: The export it was made from.
        layers: What each plan entry is in the graph.
        warnings: What the user should know.
        samples: How many samples calibration has shown it.
        skipped: How many more it was spared because ranges had settled.
    """

    runner: GraphRunner
    captured: Captured
    layers: dict[str, Layer]
    warnings: tuple[str, ...]
    plan: Plan
    counter: BranchCounter
    ranges: Ranges | None = None
    samples: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Pt2ePlan(Plan):
    """A plan that keeps the graph it was read from, so that preparing need not export again."""

    made: list[tuple[Any, Observed]] = field(default_factory=list, repr=False, compare=False)


class Pt2eQuantizer(ModelQuantizer[ConfigT]):
    """Drives one PT2E quantizer.

    A backend says in :meth:`build` which torchao quantizer the configuration means.
    """

    exports: ClassVar[Mapping[str, Export]] = {}
    """Forms the backend's models can be written in, by name."""

    @abstractmethod
    def build(self, namer: Namer) -> Quantizer:
        """The torchao quantizer for the configuration.

        Args:
            namer: Names the nodes of the model's graphs, for rules.
        """

    def describe(self) -> str:
        """Name of the torchao quantizer, for reasons in plans."""
        return self.config.name

    def strict(self) -> bool | None:
        """How to export; None decides by what the model needs."""
        return self.config.strict

    def plan(self, model: nn.Module, example: Batch | None = None) -> Plan:
        """Export a copy, let the quantizer annotate it, and read what it decided.

        Raises:
            QuantizationError: There is no example, or the model cannot be exported.
        """
        observed = self._observe(model, example)
        return dataclasses.replace(observed.plan, made=[(_identity(model), observed)])  # type: ignore[call-arg]

    def prepare(self, model: nn.Module, plan: Plan, example: Batch | None = None) -> Observed:
        """The graph with observers: the plan's own if it was made for this model."""
        made = getattr(plan, "made", [])
        if made:
            identity, observed = made.pop()
            if identity == _identity(model):
                found: Observed = observed
                return found
        return self._observe(model, example)

    def calibrate(self, prepared: Observed, batch: Batch) -> None:
        """Let the observers see one batch, unless ranges have settled."""
        size = len(batch)
        if prepared.ranges is not None and prepared.ranges.settled:
            prepared.skipped += size
            return
        with torch.no_grad():
            batch.run(prepared.runner)
        prepared.samples += size
        if prepared.ranges is not None:
            prepared.ranges.look()

    def convert(self, prepared: Observed) -> Pt2eModel | TrainableModel:
        """Replace observers by quantize and dequantize operations; with ``qat``, only later."""
        if prepared.samples == 0:
            # Weights are observed by running the graph, also where nothing else is.
            with torch.no_grad():
                prepared.captured.example.run(prepared.runner)
        prepared.counter.close()
        told = list(prepared.plan.warnings)
        for branch, seen in prepared.counter.seen.items():
            if seen == 0 and prepared.samples and self._into_branches:
                told.append(f"no sample took the branch {branch}: its ranges mean nothing")
                warnings.warn(told[-1], stacklevel=2)
        record = {
            "samples": prepared.samples,
            "skipped": prepared.skipped,
            "branches": dict(prepared.counter.seen),
            "batch": "dynamic" if prepared.captured.dynamic else "static",
        }
        plan = dataclasses.replace(prepared.plan, warnings=tuple(told))
        notes = _notes(prepared)
        graph = prepared.runner.graph

        def finish(graph: fx.GraphModule) -> Pt2eModel:
            converted = convert_all(graph, convert_pt2e, into_branches=self._into_branches)
            made = Pt2eModel(
                GraphRunner(converted, prepared.runner.samples),
                plan,
                layers=_moved(prepared.layers, converted) if self.config.qat else prepared.layers,
                example=prepared.captured.example.first(),
                config=self.config,
                exports=self.exports,
                record=record,
            )
            made.notes = list(notes)
            return made

        if not self.config.qat:
            return finish(graph)
        runner = TrainableRunner(graph, prepared.runner.samples)
        runner.eval()
        model = TrainableModel(runner, plan, layers=prepared.layers, finish=finish, record=record)
        model.notes = [*notes, "fake-quantized for training; exports and files are converted"]
        return model

    def load(self, model: nn.Module, directory: Path, example: Batch | None = None) -> Pt2eModel:
        """Load the saved program; the float model is not needed for it.

        Raises:
            QuantizationError: The files are missing, damaged, or of another backend.
        """
        return Pt2eModel.load(directory, self.config, self.exports)

    @property
    def _into_branches(self) -> bool:
        return self.config.branches == "quantized"

    def _observe(self, model: nn.Module, example: Batch | None) -> Observed:
        if example is None:
            raise QuantizationError(
                f"{self.config.name} needs example inputs to export the model",
                where="data.calibration",
                fix="Give calibration data; one batch is enough to plan",
            )
        wanted = "dynamic" if self.config.qat else self.config.batch
        for dynamic in {"auto": (True, False), "dynamic": (True,), "static": (False,)}[wanted]:
            last = not dynamic or wanted == "dynamic"
            try:
                return self._observe_as(copy.deepcopy(model), example, dynamic=dynamic)
            except Exception:
                if last:
                    raise
        raise AssertionError("a static export either works or raises")

    def _observe_as(self, model: nn.Module, example: Batch, *, dynamic: bool) -> Observed:
        namer = Namer(model)
        qat = self.config.qat
        captured = capture(model, example, dynamic=dynamic, strict=self.strict(), training=qat)
        require_supported(captured.graph)
        if qat:
            self._require_trainable(captured.graph)
            training.drop_counters(captured.graph)
        notes = findings.warnings(captured.graph, into_branches=self._into_branches)
        followers = findings.batch_norms(captured.graph)
        recorder = _Recorder(self.build(namer), namer if qat else None)
        graph = self._prepared(captured.graph, recorder)
        self._require_kind(graph)
        if qat:
            training.set_mode(graph, training=False, observing=True)
        if dynamic:
            require_any_size(graph, captured.example)
        # Fusing batch norms for training makes new nodes: names come from before.
        sites = recorder.sites if qat else namer.sites(graph)
        selection = select([site.target for site in sites], self.config)
        entries = coverage.entries(sites, selection.decisions, self.describe())
        runner = GraphRunner(graph, None if captured.dynamic else captured.size)
        planned = {entry.name for entry in entries}
        static = any(
            spec.observer is not None and role in ("input", "output")
            for entry in entries
            for role, spec in entry.specs.items()
        )
        plan = Pt2ePlan(
            entries,
            needs_calibration=static,
            steps=self._steps(captured, static),
            unmatched=selection.unmatched,
            warnings=notes,
        )
        layers = _layers([site for site in sites if site.target.name in planned], followers)
        settle = self.config.settle
        return Observed(
            runner,
            captured,
            _moved(layers, graph) if qat else layers,
            notes,
            plan,
            BranchCounter(graph),
            None if settle is None else Ranges(graph, settle.tolerance, settle.patience),
        )

    def _prepared(self, graph: fx.GraphModule, quantizer: Quantizer) -> fx.GraphModule:
        prepare = prepare_qat_pt2e if self.config.qat else prepare_pt2e
        try:
            return prepare_all(
                graph, lambda part: prepare(part, quantizer), into_branches=self._into_branches
            )
        except ValueError as error:
            if "more than one output node" not in str(error):
                raise
            raise QuantizationError(
                f"{self.describe()} cannot tell apart the calls of a module called several times",
                where=f"quantizer {self.config.name}",
                cause=str(error).splitlines()[0],
                fix="Give each call a module of its own, activations included",
            ) from error

    def _require_trainable(self, graph: fx.GraphModule) -> None:
        for node in graph.graph.nodes:
            if self._into_branches and any(True for _ in branches(node)):
                raise QuantizationError(
                    "branches of torch.cond cannot be trained with fake quantizers",
                    where=f"node {node.name!r}",
                    fix="Write branches: float, or drop qat",
                )

    def asks_for_training(self) -> bool:
        """Whether the arguments of the vendor's own configuration say so."""
        return False

    def _require_kind(self, graph: fx.GraphModule) -> None:
        """A quantizer's own configuration must be for training exactly if ours is."""
        trains = bool(training.fake_quantizers(graph))
        # Some (Core ML's) have fake quantizers observe in every case.
        if trains and not self.config.qat and self.asks_for_training():
            raise QuantizationError(
                f"{self.describe()} is configured for training (is_qat)",
                where="quantizer.config_arguments",
                fix="Write is_qat: false there, or qat: true for the whole",
            )
        if self.config.qat and not trains and observers(graph):
            raise QuantizationError(
                f"{self.describe()} puts no fake quantizers in: it is not configured for training",
                where="quantizer.config_arguments",
                fix="Write is_qat: true there if its configuration has that, or drop qat",
            )

    def _steps(self, captured: Captured, static: bool) -> tuple[Step, ...]:
        sizes = "any batch size" if captured.dynamic else "one sample; batches are cut up"
        steps = [Step("export", sizes), Step("prepare", f"{self.describe()} annotates the graph")]
        if static:
            steps.append(Step("calibrate", "observers see the calibration data"))
        if self.config.qat:
            return (*steps, Step("train", "in a loop of your own, before it is converted"))
        return (*steps, Step("convert", "observers become quantize and dequantize operations"))


class _Recorder(Quantizer):  # type: ignore[misc]
    """Passes everything on to a quantizer, and notes what it annotated.

    For training it is given the namer, and keeps the sites of the graph as it was then.
    """

    def __init__(self, inner: Quantizer, namer: Namer | None) -> None:
        super().__init__()
        self._inner, self._namer = inner, namer
        self.sites: list[Site] = []

    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        changed: fx.GraphModule = self._inner.transform_for_annotation(model)
        return changed

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        if self._namer is not None:
            training.hoist_constants(model)
        self._inner.annotate(model)
        coverage.note(model)
        if self._namer is not None:
            coverage.fold_norms(model)
            self.sites = [site for site in self._namer.sites(model) if coverage.is_noted(site)]
            coverage.mark(self.sites)
        return model

    def validate(self, model: fx.GraphModule) -> None:
        self._inner.validate(model)

    def prepare_obs_or_fq_callback(self, model: fx.GraphModule, *rest: Any) -> None:
        self._inner.prepare_obs_or_fq_callback(model, *rest)


def _notes(prepared: Observed) -> list[str]:
    """What calibration did, in sentences."""
    notes = []
    for branch, seen in prepared.counter.seen.items():
        notes.append(f"{seen} of {prepared.samples} calibration samples took the branch {branch}")
    if prepared.skipped:
        total = prepared.samples + prepared.skipped
        notes.append(
            f"calibration stopped after {prepared.samples} of {total} samples: no range moved any "
            "more (settle)"
        )
    if not prepared.captured.dynamic:
        notes.append("the graph takes one sample at a time: larger batches are cut up")
    return notes


def _layers(sites: list[Site], followers: Mapping[str, str]) -> dict[str, Layer]:
    last = {scope: site.target.name for site in sites for scope in scope_names(site.path)}
    layers = {}
    for site in sites:
        name = site.target.name
        own = site.path if site.path and last[site.path] == name else None
        layers[name] = Layer(
            site.target.op,
            (site.branch, site.node.name),
            followers.get(site.node.name, own) if not site.branch else own,
        )
    return layers


def _moved(layers: Mapping[str, Layer], graph: fx.GraphModule) -> dict[str, Layer]:
    """The layers where folding batch norms has put their nodes."""
    places = coverage.marked(graph)
    return {
        name: dataclasses.replace(layer, place=places[name])
        for name, layer in layers.items()
        if name in places
    }


def _identity(model: nn.Module) -> tuple[Any, ...]:
    """Equal for models with equal structure and weights."""
    return type(model), repr(model), fingerprint(model)
