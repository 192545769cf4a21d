"""What the host verifies about every quantized model, whichever backend made it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quark_core.batch import Batch, leaves
from quark_core.errors import QuantizationError

if TYPE_CHECKING:
    import torch

    from quark_core.quantized import QuantizedModel

Signature = tuple[tuple[tuple[int, ...], "torch.dtype"], ...]


def tensor_table(model: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes an element of each parameter and buffer, tied ones once."""
    seen: set[int] = set()
    table = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            table[name] = (tuple(tensor.shape), tensor.element_size())
    return table


def signature(model: torch.nn.Module, example: Batch | None) -> Signature | None:
    """Shapes and dtypes of the float model's outputs for the first sample; None without an example.

    Raises:
        DataError: The model cannot take it.
    """
    if example is None:
        return None
    first = example.beside(model).first()
    return _describe(first.run_float(model, "calibration data"))


def carried_out(quantized: QuantizedModel, backend: str) -> None:
    """Check that every tensor the plan promised to quantize has an encoding of that format.

    Raises:
        QuantizationError: Names the first tensor that was left out or came out differently.
    """
    found = {encoding.tensor: encoding.format for encoding in quantized.encodings()}
    for entry in quantized.plan.quantized:
        for role, spec in entry.specs.items():
            tensor = f"{entry.name}.{role}"
            if found.get(tensor) != spec.format:
                got = found.get(tensor)
                raise QuantizationError(
                    f"the plan says {spec.format}, the result "
                    + (f"has {got}" if got else "is not quantized"),
                    where=f"backend {backend}, tensor {tensor!r}",
                    fix="This is a fault of the backend; please report it there",
                )


def sound(
    quantized: QuantizedModel, example: Batch | None, expected: Signature | None, backend: str
) -> None:
    """Check that no parameter or output is NaN, and outputs look like the float model's.

    Raises:
        QuantizationError: Names the parameter, the layer, or the differing shapes.
    """
    where = f"backend {backend}"
    for name, tensor in quantized.module.named_parameters():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise QuantizationError(
                "the quantized tensor holds NaN",
                where=f"{where}, tensor {name!r}",
                fix="Check the float weights for NaN or infinities, or choose another format",
            )
    if example is None or expected is None:
        return
    output = _run_first(quantized.module, example)
    got = _describe(output)
    if got != expected:
        raise QuantizationError(
            f"the quantized model returns {_words(got)}, the float model {_words(expected)}",
            where=where,
            fix="This is a fault of the backend; please report it there",
        )
    if any(bool(leaf.isnan().any()) for leaf in leaves(output) if leaf.is_floating_point()):
        raise QuantizationError(
            "the quantized model returns NaN",
            where=f"{where}, layer {_first_nan(quantized, example)!r}",
            fix="Exclude that layer by a rule, or choose a format with more range",
        )


def _first_nan(quantized: QuantizedModel, example: Batch) -> str:
    """The first planned layer whose output holds NaN; looked for only once there is one."""
    found: list[str] = []
    handles = []
    for entry in quantized.plan.entries:
        module = quantized.layer(entry.name)
        if module is None:
            continue

        def look(_module: Any, _args: Any, output: Any, name: str = entry.name) -> None:
            if any(bool(leaf.isnan().any()) for leaf in leaves(output)):
                found.append(name)

        handles.append(module.register_forward_hook(look))
    try:
        _run_first(quantized.module, example)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "unknown"


def _run_first(model: torch.nn.Module, example: Batch) -> Any:
    return example.beside(model).first().run(model)


def _describe(output: Any) -> Signature:
    return tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves(output))


def _words(found: Signature) -> str:
    return ", ".join(f"{list(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in found)
