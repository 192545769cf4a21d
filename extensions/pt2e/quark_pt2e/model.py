"""Pt2eModel: a converted graph, and its numbers in the host's terms."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from quark_core.batch import Batch, leaves
from quark_core.errors import ExportError, QuantizationError
from quark_core.plan import Plan
from quark_core.quantized import Encoding, QuantizedModel
from quark_pt2e.config.base import Pt2eConfig
from quark_pt2e.graph import encodings
from quark_pt2e.graph.capture import at_least_two, open_batch
from quark_pt2e.graph.encodings import Place
from quark_pt2e.graph.naming import branches
from quark_pt2e.module import GraphRunner

_PROGRAM, _ABOUT = "program.pt2", "pt2e.json"


@dataclass(frozen=True)
class Layer:
    """What a plan entry is in the graph.

    Attributes:
        op: Its operation.
        place: Its node.
        counterpart: Module of the float model with the same output, or None.
    """

    op: str
    place: Place
    counterpart: str | None


class Pt2eModel(QuantizedModel):
    """A graph with quantize and dequantize operations.

    Attributes:
        layers: What each plan entry is in the graph.
        sample: One sample, from which the graph can be exported again.
        config: The configuration it was made with.
        record: What calibration did: samples seen, samples spared, samples a branch.
    """

    module: GraphRunner

    def __init__(
        self,
        module: GraphRunner,
        plan: Plan,
        *,
        layers: Mapping[str, Layer],
        example: Batch,
        config: Pt2eConfig,
        exports: Mapping[str, Callable[[Pt2eModel, Path], Path]],
        record: Mapping[str, Any],
    ) -> None:
        super().__init__(module, plan)
        self.layers = dict(layers)
        self.sample = example
        self.config = config
        self.record = dict(record)
        self._exports = exports

    @property
    def graph(self) -> fx.GraphModule:
        """The converted graph."""
        return self.module.graph

    def encodings(self) -> list[Encoding]:
        """Scale and zero point of each quantized tensor.

        Further inputs of an operation are called ``add.input:1`` and so on.
        """
        places = {name: (layer.op, layer.place) for name, layer in self.layers.items()}
        return encodings.read(self.graph, places)

    def layer(self, name: str) -> nn.Module | None:
        """A tap at the layer's node: called with its output while something listens."""
        found = self.layers.get(name)
        return None if found is None else self.module.tap(name, found.place)

    def counterpart(self, name: str) -> str | None:
        """The float module whose output the node stands for; a folded batch norm where one is."""
        found = self.layers.get(name)
        return None if found is None else found.counterpart

    def storage(self) -> dict[str, int]:
        """Packed bytes of the tensors the graph holds, and of the ranges of what flows in it."""
        ranges = {f"{row.tensor} (scale)": row.parameter_bytes() for row in self.encodings()}
        return _held(self.graph, "") | ranges

    def save(self, directory: Path) -> None:
        """Write the program as torch.export does, and what it was made with as JSON.

        The saved program is loaded again and compared before this returns.

        Raises:
            ExportError: torch.export refuses the graph, or the program computes otherwise.
        """
        again = self._write_program(directory / _PROGRAM)
        names = _renamed(self.graph, again)
        about = {
            "format": 1,
            "backend": self.config.name,
            "torch": torch.__version__,
            "torchao": version("torchao"),
            "samples": self.module.samples,
            "plan": self.plan.to_dict(),
            "layers": {
                name: [layer.op, list(names.get(layer.place, ("", ""))), layer.counterpart]
                for name, layer in self.layers.items()
            },
            "calibration": self.record,
        }
        (directory / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    def _write_program(self, path: Path) -> fx.GraphModule:
        """Write the program, load it again, and return it once it is proven."""
        torch.export.save(self.export_program(dynamic=self.module.samples is None), path)
        again = _graph_of(torch.export.load(path))
        with torch.no_grad():
            expected = list(leaves(self.sample.run(self.graph)))
            found = list(leaves(self.sample.run(again)))
        if not all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)):
            path.unlink()
            raise ExportError("the saved program computes something else", where=str(path))
        return again

    @staticmethod
    def load(
        directory: Path,
        config: Pt2eConfig,
        exports: Mapping[str, Callable[[Pt2eModel, Path], Path]],
    ) -> Pt2eModel:
        """The model that :meth:`save` wrote.

        Raises:
            QuantizationError: The files are missing, damaged, or of another backend.
        """
        try:
            about = json.loads((directory / _ABOUT).read_text(encoding="utf-8"))
            if about["backend"] != config.name:
                raise ValueError(f"it was saved by {about['backend']}")
            program = torch.export.load(directory / _PROGRAM)
            layers = {
                name: Layer(op, (place[0], place[1]), counterpart)
                for name, (op, place, counterpart) in about["layers"].items()
            }
            args, kwargs = program.example_inputs
            return Pt2eModel(
                GraphRunner(_graph_of(program), about["samples"]),
                Plan.from_dict(about["plan"]),
                layers=layers,
                example=Batch(tuple(args), dict(kwargs)).first(),
                config=config,
                exports=exports,
                record=about["calibration"],
            )
        except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise QuantizationError(
                "cannot load the saved model",
                where=str(directory),
                cause=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}",
                fix="Quantize again",
            ) from error

    def export_program(self, *, dynamic: bool = False) -> torch.export.ExportedProgram:
        """The converted graph exported again, for one sample or for any number.

        Raises:
            ExportError: torch.export refuses the graph.
        """
        example, shapes = self.sample, None
        if dynamic:
            example = at_least_two(example)
            shapes = open_batch(example)
        try:
            with torch.no_grad():
                return torch.export.export(
                    self.graph,
                    tuple(example.args),
                    dict(example.kwargs),
                    dynamic_shapes=shapes,
                    strict=False,
                )
        except Exception as error:
            raise ExportError(
                "torch.export refuses the quantized graph",
                where=f"backend {self.config.name}",
                cause=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}",
            ) from error

    def export(self, name: str, path: Path) -> Path:
        """Write the model in one of the backend's own forms.

        ``pt2`` is the program as torch.export saves it, which :func:`quark_pt2e.load_program`
        loads; ``onnx`` an ONNX model. Both exist for every backend.

        Raises:
            ExportError: There is no such form, or the model does not fit it.
        """
        if name == "pt2":
            file = path.with_suffix(".pt2")
            self._write_program(file)
            return file
        exports = {**self._exports, "onnx": _ONNX}
        if name not in exports:
            known = ", ".join((*exports, "pt2"))
            raise ExportError(
                f"{self.config.name} has no export {name!r}",
                where="export",
                fix=f"Its own forms: {known}",
            )
        return exports[name](self, path)


def lazily(place: str) -> Callable[[Pt2eModel, Path], Path]:
    """An export whose module is imported when it is used: lowering pulls in whole compilers."""
    module, _, function = place.partition(":")

    def export(model: Pt2eModel, path: Path) -> Path:
        written: Path = getattr(importlib.import_module(module), function)(model, path)
        return written

    return export


_ONNX = lazily("quark_pt2e.lowering.qdq:export")


def _graph_of(program: torch.export.ExportedProgram) -> fx.GraphModule:
    graph = program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    return graph


def _renamed(before: fx.GraphModule, after: fx.GraphModule) -> dict[Place, Place]:
    """Where each node of a graph is after exporting it again: the order of nodes stays."""
    found: dict[Place, Place] = {}
    _pair(before, after, "", "", found)
    return found


def _pair(
    before: fx.GraphModule, after: fx.GraphModule, old: str, new: str, found: dict[Place, Place]
) -> None:
    ours, theirs = _in_order(before), _in_order(after)
    if [str(node.target) for node in ours if node.op == "call_function"] != [
        str(node.target) for node in theirs if node.op == "call_function"
    ]:
        raise ExportError("exporting the graph again changed its operations", where="checkpoint")
    for one, other in zip(ours, theirs, strict=True):
        found[old, one.name] = (new, other.name)
        for (side, _, inner), (side_, _, inner_) in zip(
            branches(one), branches(other), strict=True
        ):
            _pair(inner, inner_, _join(old, side), _join(new, side_), found)


def _in_order(graph: fx.GraphModule) -> list[fx.Node]:
    """Inputs, then operations, then the output: exporting moves the inputs to the front."""
    return [
        node
        for op in ("placeholder", "call_function", "output")
        for node in graph.graph.nodes
        if node.op == op
    ]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _held(graph: fx.GraphModule, branch: str) -> dict[str, int]:
    """Packed bytes of each tensor that a graph and its branches read."""
    sizes = {}
    for node in graph.graph.nodes:
        tensor = encodings.held(graph, str(node.target)) if node.op == "get_attr" else None
        users = [user for user in node.users if not _as_range(user, node)]
        if tensor is not None and users:
            codes = [found for user in users if (found := _codes(user, node)) is not None]
            bits = codes[0] if codes else tensor.element_size() * 8
            sizes[_join(branch, str(node.target))] = -(-tensor.numel() * bits // 8)
        for side, _, inner in branches(node):
            sizes |= _held(inner, _join(branch, side))
    return sizes


def _as_range(user: fx.Node, source: fx.Node) -> bool:
    """Whether ``user`` takes a tensor for its scale or zero point, which encodings count."""
    converts = encodings.is_dequantize(user) or encodings.is_quantize(user)
    return converts and user.args[0] is not source


def _codes(user: fx.Node, source: fx.Node) -> int | None:
    """Bits of a stored tensor's codes, if ``user`` turns them into real values."""
    if not encodings.is_dequantize(user) or user.args[0] is not source:
        return None
    numbers = encodings.conversion(user)
    return None if numbers is None else (numbers.high - numbers.low).bit_length()
