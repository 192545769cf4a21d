"""Files that torch itself reads: TorchScript and torch.export programs."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quark_brevitas.subject import Call, Subject
from quark_core.batch import Batch, main_output


def write_torchscript(subject: Subject, path: Path, batched: bool) -> None:
    """Write quantize and dequantize calls in TorchScript; otherwise as :func:`write_program`."""
    from brevitas.export import export_torch_qcdq

    call = subject.traced(batched)
    export_torch_qcdq(call.positional(subject.copy()), args=call.inputs, export_path=str(path))


def run_torchscript(path: Path, call: Call) -> dict[str, Tensor]:
    """What the file computes."""
    loaded = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    return {"sqnr_db": main_output(loaded(*call.inputs))}


def write_program(subject: Subject, path: Path, batched: bool) -> None:
    """Write a torch.export program.

    Args:
        subject: What is exported.
        path: The file.
        batched: Whether any number of samples will do.
    """
    from brevitas.export.inference import quant_inference_mode

    module = subject.copy()
    batch = subject.traced(batched).batch
    _drop_uncalled(module, batch)
    shapes: Any = None
    if batched:
        collection: Any = torch.export.ShapesCollection
        shapes = collection()
        for tensor in batch.tensors():
            shapes[tensor] = {0: torch.export.Dim.DYNAMIC}
    with quant_inference_mode(module):
        # The first call fixes the scales, which torch.export could not see through.
        batch.run(module)
        program = torch.export.export(
            module, batch.args, dict(batch.kwargs), dynamic_shapes=shapes, strict=False
        )
    torch.export.save(program, path)


def _drop_uncalled(module: nn.Module, batch: Batch) -> None:
    """Take out layers that are never called, in place: Brevitas would ask for their scales."""
    layers = {name: part for name, part in module.named_modules() if hasattr(part, "weight_quant")}
    called: set[str] = set()
    with ExitStack() as stack:
        for name, part in layers.items():
            hook = part.register_forward_pre_hook(lambda *_, name=name: called.add(name))
            stack.callback(hook.remove)
        batch.run(module)
    for name in layers.keys() - called:
        module.set_submodule(name, nn.Identity())


def run_program(path: Path, call: Call) -> dict[str, Tensor]:
    """What the file computes."""
    return {"sqnr_db": call.run(torch.export.load(path).module())}
