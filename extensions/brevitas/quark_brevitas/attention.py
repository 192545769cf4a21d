"""Quantized attention: queries, keys, values and softmax within scaled dot-product attention.

The call of torch's function has no module whose quantizers could live there. In a traced graph
each call becomes one; elsewhere each module that makes such calls in its own forward is given
one, and its calls are led there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from quark_brevitas.graphs import is_traced
from quark_brevitas.options import Attention
from quark_core.batch import Batch
from quark_core.spec import TensorSpec

OP = "attention"
SITE = "sdpa"
"""Name of the module within the block that calls attention."""
PARTS: dict[str, dict[str, str]] = {
    "qkvs": {
        "query": "q_scaled_quant",
        "key": "k_transposed_quant",
        "value": "v_quant",
        "softmax": "attn_output_weights_quant",
    },
    "qkv": {"query": "q_scaled_quant", "key": "k_transposed_quant", "value": "v_quant"},
    "kv": {"key": "k_transposed_quant", "value": "v_quant"},
}
"""Brevitas's quantizers by the tensor they quantize."""
_ALL = tuple(PARTS["qkvs"].values())

Module = TypeVar("Module", bound=nn.Module)


def sites(model: nn.Module, example: Batch | None) -> list[str]:
    """Names that calls of attention will have, in the order they are made.

    Args:
        model: The float model, or its traced graph.
        example: One batch, which is run unless the model is traced.
    """
    if is_traced(model):
        changed = put_sites(copy.deepcopy(model), [])
        return [name for name, module in changed.named_modules() if _is_site(module)]
    if example is None:
        return []
    return [f"{name}.{SITE}" if name else SITE for name in _callers(model, example)]


def put_sites(model: Module, names: list[str]) -> Module:
    """Give each call of attention a module, in place; float still.

    Args:
        model: The float model, or its traced graph.
        names: What :func:`sites` found.
    """
    from brevitas.graph.standardize import TorchFunctionalToModule
    from brevitas.nn import ScaledDotProductAttention

    if is_traced(model):
        pair = (scaled_dot_product_attention, ScaledDotProductAttention)
        changed: Module = TorchFunctionalToModule(fn_to_module_map=(pair,)).apply(model)
        return changed
    for name in names:
        block = model.get_submodule(name.rpartition(".")[0])
        block.add_module(SITE, ScaledDotProductAttention())
        block.__class__ = _attentive(type(block))
    return model


def settings(
    options: Attention,
    spec: TensorSpec,
    scale_rounding: str | None = None,
    *,
    half: bool = False,
) -> dict[str, Any]:
    """The quantizers Brevitas's attention takes."""
    from quark_brevitas.quantizers import input_quantizer

    quantizer: Any = input_quantizer(spec, scale_rounding=scale_rounding, half=half)
    given: dict[str, Any] = {
        name: quantizer if name in PARTS[options.tensors].values() else None for name in _ALL
    }
    key, softmax = PARTS["qkvs"]["key"], PARTS["qkvs"]["softmax"]
    if spec.granularity is not None and spec.granularity.kind == "token":
        # Keys come transposed: a token is a column.
        given[key] = quantizer.let(
            scaling_stats_input_view_shape_impl=OverColumns,
            dynamic_scaling_broadcastable_fn=_one_a_column,
        )
    if given[softmax] is not None and spec.symmetric and spec.number_format.exponent is None:
        # Shares of attention are never negative.
        given[softmax] = quantizer.let(signed=False)
    return given


def quantized(
    options: Attention,
    spec: TensorSpec,
    scale_rounding: str | None = None,
    *,
    half: bool = False,
) -> nn.Module:
    """A quantized attention for a traced graph, which may be given quantized tensors."""
    from brevitas.nn import QuantScaledDotProductAttention
    from brevitas.quant_tensor import QuantTensor

    class Attending(QuantScaledDotProductAttention):  # type: ignore[misc]
        """Takes the values: Brevitas's own cannot scale what comes with a scale already."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            def plain(value: Any) -> Any:
                return value.value if isinstance(value, QuantTensor) else value

            values = {name: plain(value) for name, value in kwargs.items()}
            return super().forward(*map(plain, args), **values)

    site: nn.Module = Attending(**settings(options, spec, scale_rounding, half=half))
    return site.eval()


def quantizers(site: nn.Module) -> Iterator[tuple[str, Any]]:
    """The quantizers in use within a quantized attention, by the tensor they quantize."""
    for tensor, name in PARTS["qkvs"].items():
        act = getattr(site, name).act_quant
        if act.is_quant_enabled or act.disable_quant:
            yield tensor, act


def _is_site(module: nn.Module) -> bool:
    from brevitas.nn import ScaledDotProductAttention

    return isinstance(module, ScaledDotProductAttention)


class OverColumns(nn.Module):
    """Columns of each matrix, one a row: ``[..., rows, columns]`` becomes ``[n, rows]``."""

    # Brevitas injects what a constructor names, and refuses those that take anything.
    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Arrange them."""
        return x.transpose(-1, -2).reshape(-1, x.shape[-2])


def _one_a_column(scale: Tensor, shape: Sequence[int]) -> Tensor:
    return scale.view(*shape[:-2], 1, shape[-1])


class _Led(TorchFunctionMode):
    """Leads calls of torch's attention to a module."""

    def __init__(self, target: Callable[..., Any]) -> None:
        super().__init__()
        self._target = target

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return self._target(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attentive(cls: type[nn.Module]) -> type[nn.Module]:
    """The same class, its calls of attention led to the module of that name."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Led(getattr(self, SITE)):
            return cls.forward(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def _callers(model: nn.Module, example: Batch) -> list[str]:
    """Modules whose own forward calls attention, in order."""
    inside: list[str] = []
    found: dict[str, None] = {}

    def note(*args: Any, **kwargs: Any) -> Any:
        found.setdefault(inside[-1] if inside else "")
        return scaled_dot_product_attention(*args, **kwargs)

    def leaving(*_: Any) -> None:
        inside.pop()

    with ExitStack() as stack:
        for name, module in model.named_modules():
            enter = module.register_forward_pre_hook(_entering(inside, name))
            leave = module.register_forward_hook(leaving)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        stack.enter_context(_Led(note))
        example.first().run(model)
    # MultiheadAttention's own projections are out of reach.
    return [
        name for name in found if not isinstance(model.get_submodule(name), nn.MultiheadAttention)
    ]


def _entering(inside: list[str], name: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        inside.append(name)

    return hook
