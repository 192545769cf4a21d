"""Lowered programs that can be run: TOSA delegates on the reference model, the rest in torch."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import fx

from quark_core.batch import Batch, leaves
from quark_core.errors import ExportError
from quark_pt2e.lowering import reporting


def lower(program: torch.export.ExportedProgram, partitioner: Any) -> Any:
    """ExecuTorch's edge program with what the partitioner accepts handed to its backend.

    Raises:
        ExportError: The backend cannot compile its part.
    """
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    try:
        return to_edge_transform_and_lower(
            program,
            partitioner=[partitioner],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise ExportError(
            "the lowered program cannot be compiled",
            where=type(partitioner).__name__,
            cause=f"{type(error).__name__}: {lines[0][:200] if lines else ''}",
            fix="Leave the layers it names in float by a rule, or choose another target",
        ) from error


def delegates(edge: Any) -> list[Any]:
    """The parts of an edge program that a backend compiled, in order."""
    graph = edge.exported_program().graph_module
    return [
        getattr(graph, str(node.target))
        for node in graph.graph.nodes
        if node.op == "get_attr" and str(node.target).startswith("lowered_module")
    ]


def outside(edge: Any) -> dict[str, int]:
    """Operations left to the CPU, with how often; conversions at the ends are not counted."""
    found: dict[str, int] = {}
    for node in edge.exported_program().graph_module.graph.nodes:
        name = getattr(getattr(node.target, "_op", None), "_name", "")
        if node.op == "call_function" and name and "quantize_per" not in name:
            short = name.partition("::")[2]
            found[short] = found.get(short, 0) + 1
    return found


class IntegerProgram:
    """Runs an edge program whose delegates are TOSA, bit for bit as TOSA defines it.

    Raises:
        MissingDependencyError: The reference model is not installed.
    """

    def __init__(self, edge: Any) -> None:
        try:
            import tosa_reference_model
        except ImportError as error:
            raise reporting.missing(
                "TOSA's reference model", "quark-pt2e[ethos-u]", error
            ) from error
        self._model = tosa_reference_model
        self._program = edge.exported_program()

    def __call__(self, batch: Batch) -> list[torch.Tensor]:
        """The outputs for one sample, as real numbers.

        Raises:
            ExportError: The reference model refuses the program.
        """
        with torch.no_grad():
            values = _Interpreter(self._program.graph_module, self._delegate).run(
                *self._inputs(batch)
            )
        return list(leaves(values))

    def _inputs(self, batch: Batch) -> list[Any]:
        program = self._program
        held = {**program.state_dict, **program.constants}
        signature = program.graph_signature
        names = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        given = iter(list(batch.tensors()))
        return [
            held[names[node.name]] if node.name in names else next(given)
            for node in program.graph_module.graph.nodes
            if node.op == "placeholder"
        ]

    def _delegate(self, module: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        arrays = [np.ascontiguousarray(tensor.detach().numpy()) for tensor in inputs]
        with _silenced():
            results, status = self._model.run(module.processed_bytes, arrays)
        if status != self._model.GraphStatus.TOSA_VALID:
            raise ExportError(
                f"TOSA's reference model says {status}",
                where="TOSA program",
                fix="This is a fault of the lowering; please report it to ExecuTorch",
            )
        output = module.original_module.graph.output_node().args[0]
        return [
            _as(torch.from_numpy(np.array(result)), node.meta["val"])
            for result, node in zip(results, output, strict=True)
        ]


class _Interpreter(fx.Interpreter):
    """Runs edge operations as the torch operations they stand for."""

    def __init__(self, graph: fx.GraphModule, delegate: Any) -> None:
        super().__init__(graph)
        self._delegate = delegate

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "__name__", "") == "executorch_call_delegate":
            return self._delegate(args[0], list(args[1:]))
        return super().call_function(getattr(target, "_op", target), args, kwargs)


def _as(result: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The result in the shape and dtype of the graph; unsigned codes come back signed."""
    if result.dtype != expected.dtype and result.dtype.itemsize == expected.dtype.itemsize:
        result = result.view(expected.dtype)
    return result.reshape(expected.shape)


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep back what a compiled library prints: it writes past Python's own streams."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as sink:
        try:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
            yield
        finally:
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
