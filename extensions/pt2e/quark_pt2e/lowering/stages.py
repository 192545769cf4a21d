"""Float against fake-quantized against integer: the comparison users otherwise build by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from quark_core.batch import Batch, as_batch, leaves, main_output
from quark_pt2e.graph.encodings import Conversion, conversion, is_dequantize, quantized_output
from quark_pt2e.lowering.reporting import table
from quark_pt2e.model import Pt2eModel

Run = Callable[[Batch], list[torch.Tensor]]
"""Runs a lowered program on one sample; returns its outputs as real numbers."""


class Probe:
    """The quantized graph with the outputs of its layers as further outputs.

    Attributes:
        graph: That graph; it returns one flat list.
        names: What each output is: ``output``, ``output:1``..., then the layers.
        scales: The numbers of each output's codes, or None where it is float.
        counterparts: Module of the float model for each output; empty for the model's own.
    """

    def __init__(self, model: Pt2eModel, *, layers: bool = True) -> None:
        rows = {row.layer: row for row in model.encodings() if row.role == "output"}
        chosen = [
            entry.name
            for entry in model.plan.entries
            if layers
            and entry.name in rows
            and entry.op not in ("input", "output")
            and not model.layers[entry.name].place[0]
        ]
        finals = _final_conversions(model)
        self.graph = _with_outputs(model.graph, [model.layers[name].place[1] for name in chosen])
        self.names = [f"output:{i}" if i else "output" for i in range(len(finals))] + chosen
        self.scales = finals + [_numbers(rows[name]) for name in chosen]
        self.counterparts: list[str | None] = [""] * len(finals)
        self.counterparts += [model.counterpart(name) for name in chosen]

    def program(self, example: Batch) -> torch.export.ExportedProgram:
        """The probe as an exported program for one sample."""
        with torch.no_grad():
            return torch.export.export(
                self.graph, tuple(example.args), dict(example.kwargs), strict=False
            )


def _with_outputs(graph: fx.GraphModule, nodes: list[str]) -> fx.GraphModule:
    """A graph that shares all tensors with ``graph`` and also returns what some nodes yield."""
    wider = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    by_name = {node.name: node for node in wider.graph.nodes}
    output = wider.graph.output_node()
    flat = list(pytree.tree_leaves(output.args[0]))
    for name in nodes:
        node = by_name[name]
        after = quantized_output(node)
        flat.append(node if after is None else _own_copy(wider, after[1]))
    output.args = (flat,)
    codegen: Any = wider.graph._codegen
    spec = pytree.tree_flatten([0] * len(flat))[1]
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=spec)
    wider.recompile()
    return wider


def _own_copy(graph: fx.GraphModule, dequantize: fx.Node) -> fx.Node:
    """A second conversion of the same codes: one that is also read inside would be cut off."""
    with graph.graph.inserting_after(dequantize):
        return graph.graph.node_copy(dequantize)


@dataclass
class Tally:
    """How far three versions of one tensor differ.

    Attributes:
        signal: Sum of squares of the float tensor.
        fake_noise: Sum of squared differences of the fake-quantized from the float tensor.
        whole_noise: The same for the integer tensor.
        own_signal: Sum of squares of the fake-quantized tensor.
        own_noise: Sum of squared differences between integer and fake-quantized.
        count, equal: Elements, and those with equal codes.
        largest: Largest difference of codes.
        float_known: Whether the float model has the tensor.
    """

    signal: float = 0.0
    fake_noise: float = 0.0
    whole_noise: float = 0.0
    own_signal: float = 0.0
    own_noise: float = 0.0
    count: int = 0
    equal: int = 0
    largest: int = 0
    float_known: bool = False
    histogram: dict[int, int] = field(default_factory=dict)

    def add(
        self,
        truth: torch.Tensor | None,
        fake: torch.Tensor,
        whole: torch.Tensor,
        numbers: Conversion | None,
    ) -> None:
        """Add one sample."""
        fake, whole = fake.double(), whole.double().reshape(fake.shape)
        self.own_signal += float(fake.square().sum())
        self.own_noise += float((whole - fake).square().sum())
        self.count += fake.numel()
        if numbers is not None and numbers.scale is not None:
            apart = ((whole - fake) / numbers.scale.double()).round().abs().long()
            for step, times in zip(*torch.unique(apart, return_counts=True), strict=True):
                self.histogram[int(step)] = self.histogram.get(int(step), 0) + int(times)
            self.equal += int((apart == 0).sum())
            self.largest = max(self.largest, int(apart.max()))
        if truth is not None and truth.shape == fake.shape:
            self.float_known = True
            self.signal += float(truth.double().square().sum())
            self.fake_noise += float((fake - truth.double()).square().sum())
            self.whole_noise += float((whole - truth.double()).square().sum())


@dataclass
class Comparison:
    """Three versions of a model on the same samples.

    Attributes:
        samples: How many.
        tallies: By tensor.
        scaled: Tensors with codes to compare.
        right: Correct answers of float, fake-quantized and integer model; empty without labels.
    """

    samples: int
    tallies: dict[str, Tally]
    scaled: set[str]
    right: dict[str, int]

    def accuracy(self, stage: str) -> float:
        """Share of correct answers of ``float``, ``fake-quant`` or ``integer``."""
        return self.right[stage] / self.samples

    def facts(self, integer: str) -> dict[str, str]:
        """The main figures in words; ``integer`` names the third stage."""
        output = self.tallies["output"]
        found = {"samples compared": str(self.samples)}
        for stage, correct in self.right.items():
            name = integer if stage == "integer" else stage
            found[f"accuracy, {name}"] = f"{correct / self.samples:.4f}"
        if "output" in self.scaled:
            found["equal output codes"] = f"{output.equal / output.count:.2%}"
            found["largest difference"] = f"{output.largest} LSB"
        found[f"{integer} against fake-quant"] = f"{ratio(output.own_signal, output.own_noise)} dB"
        return found

    def metrics(self, integer: str) -> dict[str, float]:
        """The main figures as numbers; ``integer`` names the third stage."""
        output = self.tallies["output"]
        found: dict[str, float] = {"samples compared": self.samples}
        for stage, correct in self.right.items():
            name = integer if stage == "integer" else stage
            found[f"accuracy {name}"] = correct / self.samples
        if "output" in self.scaled and output.count:
            found["equal output codes"] = output.equal / output.count
            found["largest difference LSB"] = output.largest
        noises = {f"sqnr {integer} against fake-quant dB": (output.own_signal, output.own_noise)}
        if output.float_known:
            noises["sqnr fake-quant against float dB"] = (output.signal, output.fake_noise)
            noises[f"sqnr {integer} against float dB"] = (output.signal, output.whole_noise)
        return found | {
            name: 10 * math.log10(signal / noise)
            for name, (signal, noise) in noises.items()
            if signal > 0 and noise > 0
        }

    def tables(self, integer: str) -> list[dict[str, Any]]:
        """SQNR and differences of codes by tensor, and how often each difference occurs."""
        rows = []
        for name, tally in self.tallies.items():
            scaled = name in self.scaled and tally.count > 0
            known = tally.float_known
            rows.append(
                (
                    name,
                    ratio(tally.signal, tally.fake_noise) if known else None,
                    ratio(tally.signal, tally.whole_noise) if known else None,
                    ratio(tally.own_signal, tally.own_noise),
                    f"{tally.equal / tally.count:.2%}" if scaled else None,
                    tally.largest if scaled else None,
                )
            )
        columns = (
            "tensor",
            "fake-quant against float, dB",
            f"{integer} against float, dB",
            f"{integer} against fake-quant, dB",
            "equal codes",
            "largest LSB",
        )
        found = [table(f"float, fake-quant, {integer}", columns, rows)]
        steps = self.tallies["output"].histogram
        if steps:
            counts = [(step, steps[step]) for step in sorted(steps)]
            found.append(table("outputs by difference in LSB", ("LSB", "outputs"), counts))
        return found


def compare(model: Pt2eModel, probe: Probe, run: Run, limit: int) -> Comparison:
    """Run float, fake-quantized and lowered model side by side.

    Args:
        model: The quantized model, with the float model and evaluation data if it has them.
        probe: What to compare.
        run: Runs the lowered probe.
        limit: Most samples.
    """
    tallies = {name: Tally() for name in probe.names}
    right: dict[str, int] = {}
    count = 0
    for sample, label in samples(model, limit):
        count += 1
        with torch.no_grad():
            fakes = sample.run(probe.graph)
        wholes = run(sample)
        truths = _float_outputs(model.float_model, probe, sample)
        for name, numbers, truth, fake, whole in zip(
            probe.names, probe.scales, truths, fakes, wholes, strict=True
        ):
            tallies[name].add(truth, fake, whole, numbers)
        if label is not None:
            stages = {"float": truths[0], "fake-quant": fakes[0], "integer": wholes[0]}
            for stage, output in stages.items():
                if output is not None:
                    hit = int(output.reshape(-1).argmax()) == label
                    right[stage] = right.get(stage, 0) + hit
    scaled = {
        name for name, numbers in zip(probe.names, probe.scales, strict=True) if numbers is not None
    }
    return Comparison(count, tallies, scaled, right)


def samples(model: Pt2eModel, limit: int) -> Iterator[tuple[Batch, int | None]]:
    """Single samples of the evaluation data with their class; the example where there are none."""
    if model.evaluation is None:
        yield model.sample, None
        return
    count = 0
    for batch in map(as_batch, model.evaluation):
        for index in range(len(batch)):
            if count == limit:
                return
            count += 1
            one = batch.map(lambda leaf, at=index: leaf[at : at + 1] if leaf.ndim else leaf)  # type: ignore[misc]
            yield one, _label(batch.target, index)


def _label(target: Any, index: int) -> int | None:
    if isinstance(target, torch.Tensor) and target.ndim == 1 and not target.is_floating_point():
        return int(target[index])
    return None


def _float_outputs(
    model: nn.Module | None, probe: Probe, sample: Batch
) -> list[torch.Tensor | None]:
    if model is None:
        return [None] * len(probe.names)
    heard: dict[str, torch.Tensor] = {}
    handles = []
    for name in {part for part in probe.counterparts if part}:

        def keep(_module: Any, _args: Any, output: Any, name: str = name) -> None:
            heard[name] = main_output(output)

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    flags = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            for module, _ in flags:
                module.training = False
            finals = list(leaves(sample.beside(model).run(model)))
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in flags:
            module.training = flag
    own: list[torch.Tensor | None] = list(finals)
    rest = [heard.get(name) if name else None for name in probe.counterparts[len(finals) :]]
    return own + rest


def _final_conversions(model: Pt2eModel) -> list[Conversion | None]:
    node = next(node for node in model.graph.graph.nodes if node.op == "output")
    found = []
    for argument in node.all_input_nodes:
        found.append(conversion(argument) if is_dequantize(argument) else None)
    return found


def _numbers(row: Any) -> Conversion:
    return Conversion(row.scale, row.zero_point, 0, 0, torch.int32, row.axis)


def ratio(signal: float, noise: float) -> str:
    """Signal to noise in dB, as text; ``equal`` without any noise."""
    if noise == 0:
        return "equal"
    return f"{10 * math.log10(signal / noise):.1f}" if signal > 0 else "-"
