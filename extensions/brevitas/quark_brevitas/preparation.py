"""Rewriting a model with Brevitas: preprocessing, then quantized layers."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quark_brevitas import attention, embedding
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.wrappers import WRAPPED, inner
from quark_core.batch import Batch
from quark_core.errors import QuantizationError
from quark_core.plan import Plan, PlanEntry

OPS: dict[type, str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Embedding: "embedding",
}
"""Layers the backend quantizes; exactly these classes, as Brevitas replaces no subclass."""


def is_roundable(entry: PlanEntry) -> bool:
    """Whether a layer multiplies its inputs by rows of its weight, as rounding algorithms need."""
    return entry.op in ("linear", "conv1d", "conv2d", "conv3d")


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what Brevitas warns of on every use and no user can act on."""
    with warnings.catch_warnings():
        for module in (r"brevitas\..*", r"torch\..*"):
            warnings.filterwarnings("ignore", module=module)
        yield


MERGE_BN = "merge_bn: true"
"""The one option that does without a traced graph where there is none."""


def must_trace(config: BrevitasConfig, model: nn.Module) -> list[str]:
    """The options that need a traced graph, as a recipe would write them."""
    equalization, rotation = config.activation_equalization, config.rotation
    reasons = {
        "backend: fx": config.backend == "fx",
        f"equalize_iterations: {config.equalize_iterations}": bool(config.equalize_iterations),
        f"channel_splitting: {config.channel_splitting:g}": bool(config.channel_splitting),
        "rotation.mode: fx": rotation is not None and rotation.mode == "fx",
        "activation_equalization.mode: fx": equalization is not None and equalization.mode == "fx",
        "attention.mode: fx": config.attention is not None and config.attention.mode == "fx",
        MERGE_BN: config.merge_bn and has_batch_norm(model),
    }
    return [reason for reason, holds in reasons.items() if holds]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether there is any BatchNorm to fold."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def trace(model: nn.Module) -> Any:
    """The graph Brevitas traces of a copy of the model.

    Raises:
        Exception: Whatever the model's own forward raises when it is traced.
    """
    from brevitas.fx import symbolic_trace

    with quiet():
        return symbolic_trace(copy.deepcopy(model))


def fold_norms(traced: Any) -> nn.Module:
    """Fold BatchNorm into the layers before it, in place, as :func:`preprocess` does."""
    from brevitas.graph.fixed_point import MergeBatchNorm, MoveSplitBatchNormBeforeCat

    with quiet():
        folded: nn.Module = MergeBatchNorm().apply(MoveSplitBatchNormBeforeCat().apply(traced))
    return folded


def folded_into(model: nn.Module) -> dict[str, str | None]:
    """For each layer whose only user is a BatchNorm, that BatchNorm's name."""
    traced = trace(model)
    modules = dict(traced.named_modules())
    found: dict[str, str | None] = {}
    for node in traced.graph.nodes:
        if node.op != "call_module" or type(modules[node.target]) not in OPS:
            continue
        users = [user for user in node.users if user.op == "call_module"]
        if len(node.users) == len(users) == 1 and has_batch_norm(modules[users[0].target]):
            found[node.target] = users[0].target
    return found


def hooks_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The user's hooks on layers, by name, for :func:`put_hooks`."""
    found = {}
    for name, module in model.named_modules():
        if type(module) in OPS and (module._forward_hooks or module._forward_pre_hooks):
            found[name] = {kind: getattr(module, kind) for kind in _HOOKS}
    return found


def put_hooks(model: nn.Module, hooks: Mapping[str, dict[str, Any]]) -> None:
    """Give hooks of layers to the layers in their places, in place."""
    for name, given in hooks.items():
        module = model.get_submodule(name)
        for kind, calls in given.items():
            getattr(module, kind).update(calls)


def untie(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Give layers weights of their own where they share them with other modules.

    An embedding and the output layer that shares its weight must not change together.

    Args:
        model: Changed in place.
        names: The layers to untie; None for all.
    """
    wanted = None if names is None else {id(model.get_submodule(name)) for name in names}
    owners = Counter(
        id(module.weight)
        for module in model.modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    )
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or owners[id(weight)] < 2:
            continue
        if wanted is None or id(module) in wanted:
            owners[id(weight)] -= 1
            module.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)


def preprocess(model: nn.Module, config: BrevitasConfig) -> nn.Module:
    """Trace the model, fold BatchNorm and equalize, as the configuration says."""
    from brevitas.graph.quantize import preprocess_for_quantize

    with quiet():
        prepared: Any = preprocess_for_quantize(
            model,
            equalize_iters=config.equalize_iterations,
            equalize_merge_bias=config.equalize_merge_bias,
            equalize_bias_shrinkage=config.equalize_bias_shrinkage or "vaiq",
            equalize_scale_computation=config.equalize_scale,
            merge_bn=config.merge_bn,
            channel_splitting_ratio=config.channel_splitting,
            channel_splitting_split_input=config.split_inputs,
        )
    _repair_methods(prepared)
    module: nn.Module = prepared
    return module


def _repair_methods(traced: Any) -> None:
    """Undo a fault of Brevitas 0.13.4: it takes a tensor method for a module of the same name.

    Where a model has a module called flatten and calls ``x.flatten(1)``, that call becomes
    ``x.flatten_1(1)``, as if it were a second use of the module.
    """
    for node in traced.graph.nodes:
        if node.op == "call_method" and not hasattr(torch.Tensor, node.target):
            node.target = re.sub(r"_\d+$", "", node.target)
    traced.recompile()


def replace_layers(model: nn.Module, plan: Plan, config: BrevitasConfig) -> nn.Module:
    """Brevitas's layerwise rewriting, with each layer's own specs."""
    from brevitas.graph.quantize import layerwise_quantize

    layers = _layer_map(plan, config, with_inputs=True)
    if config.attention is not None and config.attention_spec is not None:
        import brevitas.nn as qnn

        given = attention.settings(
            config.attention, config.attention_spec, config.scale_rounding, half=_is_half(model)
        )
        layers[qnn.ScaledDotProductAttention] = (qnn.QuantScaledDotProductAttention, given)
    first: dict[int, str] = {}
    names = {
        path: first.setdefault(id(module), path)
        for path, module in model.named_modules(remove_duplicate=False)
        if type(module) in OPS
    }
    with quiet():
        rewritten: nn.Module = layerwise_quantize(model, layers, name_blacklist=_left(model, plan))
    # Brevitas replaces a layer under the first of its names only.
    for path, name in names.items():
        if path != name:
            rewritten.set_submodule(path, rewritten.get_submodule(name))
    return rewritten


def _left(model: nn.Module, plan: Plan) -> list[str]:
    """Layers that stay float."""
    return [
        name
        for name, module in model.named_modules()
        if type(module) in OPS
        and not (_planned(name, plan) in plan and plan[_planned(name, plan)].quantized)
    ]


def replace_graph(
    model: nn.Module, plan: Plan, config: BrevitasConfig, example: Batch | None
) -> nn.Module:
    """Brevitas's fx rewriting: quantizers along the graph, weights by layer."""
    import brevitas.nn as qnn
    from brevitas.graph.quantize import layerwise_quantize, quantize

    from quark_brevitas.quantizers import input_quantizer

    quantizer = input_quantizer(
        config.input,
        scale_rounding=config.scale_rounding,
        unscaled=config.unscaled_inputs,
        half=_is_half(model),
    )
    settings = {"act_quant": quantizer, "return_quant_tensor": True}
    # After a ReLU, a symmetric grid need not spend codes on negative values.
    positive = config.input is not None and config.input.number_format.family == "integer"
    symmetric = config.input is not None and config.input.symmetric
    unsigned = (
        {**settings, "signed": False}
        if symmetric and positive and config.unsigned_relu
        else settings
    )
    activations = {
        nn.ReLU: (qnn.QuantReLU, unsigned),
        nn.ReLU6: (qnn.QuantReLU, unsigned),
        nn.Sigmoid: (qnn.QuantSigmoid, unsigned),
    }
    identities = {
        "signed": (qnn.QuantIdentity, settings),
        "unsigned": (qnn.QuantIdentity, unsigned),
    }
    layers = _layer_map(plan, config, with_inputs=False)
    # Along the graph, Brevitas would quantize the indices that an embedding is given.
    embeddings = {nn.Embedding: layers.pop(nn.Embedding)}
    with quiet():
        model = layerwise_quantize(model, embeddings, name_blacklist=_left(model, plan))
        rewritten: nn.Module = quantize(
            model,
            compute_layer_map=layers,
            quant_act_map=activations,
            quant_identity_map=identities,
        )
    _pass_indices(rewritten, example)
    for entry in plan.quantized:
        if entry.op == attention.OP:
            assert config.attention is not None
            assert entry.input is not None
            site = attention.quantized(
                config.attention, entry.input, config.scale_rounding, half=_is_half(rewritten)
            )
            rewritten.set_submodule(entry.name, site)
    return rewritten


def _pass_indices(traced: Any, example: Batch | None) -> None:
    """Undo a fault of Brevitas 0.13.4: it quantizes every input of a graph, be it token ids."""
    given = [] if example is None else list(example.args)
    named = {} if example is None else example.kwargs
    modules = dict(traced.named_modules())
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for at, node in enumerate(inputs):
        value = named.get(node.target, given[at] if at < len(given) else None)
        whole = isinstance(value, torch.Tensor) and not value.is_floating_point()
        for user in [user for user in node.users if user.target == f"{node.name}_quant"]:
            after = [modules.get(str(reader.target)) for reader in user.users]
            if whole or any(isinstance(module, nn.Embedding) for module in after):
                user.replace_all_uses_with(node)
                traced.graph.erase_node(user)
                traced.delete_submodule(user.target)
    traced.recompile()


def _layer_map(
    plan: Plan, config: BrevitasConfig, *, with_inputs: bool
) -> dict[type, tuple[type, dict[str, Any]]]:
    import brevitas.nn as qnn

    from quark_brevitas.quantizers import bias_quantizer, input_quantizer

    def entry_of(name: str) -> PlanEntry:
        return plan[_planned(name, plan)]

    # Brevitas calls lambdas, but no other functions, with the layer and its name: which is how
    # each gets specs of its own.
    settings: dict[str, Any] = {
        "weight_quant": lambda layer, name: _quantizer(entry_of(name), config, _is_half(layer)),
        "bias_quant": lambda _layer, name: bias_quantizer(entry_of(name).bias),
        "return_quant_tensor": False,
    }
    looked_up = {"weight_quant": settings["weight_quant"], "return_quant_tensor": False}
    if with_inputs:
        settings["input_quant"] = lambda layer, name: input_quantizer(
            entry_of(name).input,
            entry_of(name).op,
            scale_rounding=config.scale_rounding,
            unscaled=config.unscaled_inputs,
            half=_is_half(layer),
        )
    return {
        nn.Linear: (qnn.QuantLinear, settings),
        nn.Conv1d: (qnn.QuantConv1d, settings),
        nn.Conv2d: (qnn.QuantConv2d, settings),
        nn.Conv3d: (qnn.QuantConv3d, settings),
        nn.ConvTranspose1d: (qnn.QuantConvTranspose1d, settings),
        nn.ConvTranspose2d: (qnn.QuantConvTranspose2d, settings),
        nn.ConvTranspose3d: (qnn.QuantConvTranspose3d, settings),
        nn.Embedding: (embedding.quantized_class(), looked_up),
    }


def _is_half(module: nn.Module) -> bool:
    return any(parameter.dtype == torch.float16 for parameter in module.parameters())


def _quantizer(entry: PlanEntry, config: BrevitasConfig, half: bool) -> Any:
    from quark_brevitas.quantizers import weight_quantizer

    return weight_quantizer(
        entry.weight,
        hqo=config.hqo,
        narrow_range=config.narrow_range,
        scale_rounding=config.scale_rounding,
        round_zero_points=config.round_zero_points,
        half=half,
    )


def rounded(weight: torch.Tensor, entry: PlanEntry, config: BrevitasConfig) -> torch.Tensor:
    """A Linear layer's weight as its quantizer in Brevitas would have it."""
    import brevitas.nn as qnn

    quantizer = _quantizer(entry, config, weight.dtype == torch.float16)
    layer = qnn.QuantLinear(*reversed(weight.shape), False, weight_quant=quantizer)
    layer.weight = nn.Parameter(weight)
    found: torch.Tensor = layer.eval().quant_weight().value
    return found


def keep_float_weights(layers: Mapping[str, Any]) -> None:
    """Keep a copy of each weight where Brevitas looks for it when quantization is off."""
    for layer in layers.values():
        if not hasattr(layer, "weight_orig"):
            original = layer.weight.detach().clone().cpu()
            layer.register_buffer("weight_orig", original, persistent=False)


def _planned(path: str, plan: Plan) -> str:
    """The plan's name of a layer that may have been wrapped since."""
    name = path
    while name not in plan and name.endswith(f".{WRAPPED}"):
        name = name.removesuffix(f".{WRAPPED}")
    return name if name in plan else path


def require_layers(model: nn.Module, plan: Plan) -> None:
    """Check that every planned layer became one of Brevitas's.

    Raises:
        QuantizationError: Names the first that did not.
    """
    for entry in plan.quantized:
        layer = inner(model.get_submodule(entry.name))
        wanted = "v_quant" if entry.op == attention.OP else "weight_quant"
        if not hasattr(layer, wanted):
            raise QuantizationError(
                f"Brevitas left the layer as {type(layer).__name__}",
                where=f"layer {entry.name!r}",
                fix="Write backend: layerwise, or exclude the layer by a rule",
            )
