"""Passes over the float model that Brevitas finds by its graph and that leave outputs as they are.

Norms hand their weights to the layers after them, LayerNorm becomes RMSNorm, and what flows along
the residual stream is rotated: outliers of single channels spread over all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from quark_brevitas import unchanged
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.graphs import GraphView, is_traced, plain_norms, record
from quark_brevitas.options import Rotation
from quark_brevitas.preparation import untie
from quark_brevitas.wrappers import show_layers
from quark_core.batch import Batch
from quark_core.errors import QuantizationError

_METHODS = {"hadamard": "had", "orthogonal": "ort"}
_PASSIVE = (nn.Identity, nn.Dropout)
"""Modules a norm's weight and bias may pass, in eval mode."""


def works_on_graph(config: BrevitasConfig) -> bool:
    """Whether anything here needs the model's graph."""
    graph = config.rotation is not None and config.rotation.mode != "layerwise"
    return graph or config.merge_layernorm or config.layernorm_to_rmsnorm


def transform(
    model: nn.Module, config: BrevitasConfig, example: Batch | None, quantized: Iterable[str]
) -> list[str]:
    """Carry out what the configuration asks for, in place, and check it on the example.

    Args:
        model: The float model, or its traced graph.
        config: The configuration.
        example: One batch on the model's device; needed unless the model is traced.
        quantized: Names of the layers that will be quantized.

    Returns:
        Sentences about what was done.

    Raises:
        QuantizationError: There is no batch, nothing to rotate, or outputs have changed.
    """
    before = unchanged.output_of(model, example)
    if works_on_graph(config):
        untie(model)
        with plain_norms(model):
            view = view_of(model, example)
            if config.merge_layernorm:
                merge_norms(view)
            if config.layernorm_to_rmsnorm:
                to_rms_norms(model, view)
                view = view_of(model, example)
            if config.rotation is not None and config.rotation.mode != "layerwise":
                _rotate_graph(view, config.rotation, set(quantized), example)
    if config.rotation is not None and config.rotation.mode == "layerwise":
        _rotate_layers(model, config.rotation, set(quantized))
    show_layers(model)
    return unchanged.compared(
        before,
        unchanged.output_of(model, example),
        "rotating and merging norms",
        where="rotation, merge_layernorm, layernorm_to_rmsnorm",
        fix="Leave them out for this model, or write rotation.mode: layerwise",
    )


def view_of(model: nn.Module, example: Batch | None) -> Any:
    """The model's graph: its own where it is traced, or one recorded from the example."""
    if is_traced(model):
        return model
    if example is None:
        raise QuantizationError(
            "the graph of this model is read from a batch, and there is none",
            where="rotation, merge_layernorm",
            fix="Give calibration data, or write rotation.mode: layerwise",
        )
    return record(model, example)


def require_regions(model: nn.Module, config: BrevitasConfig, example: Batch | None) -> None:
    """Refuse a rotation of the graph where the graph has nothing to rotate.

    Args:
        model: The float model, which stays as it is, or its traced graph.
        config: The configuration.
        example: One batch; needed unless the model is traced.

    Raises:
        QuantizationError: With the reason, as far as it can be told.
    """
    with plain_norms(model):
        view = view_of(model, example)
        kinds = {type(module) for module in model.modules()}
        if config.layernorm_to_rmsnorm and not any(_layer_norms(view)):
            raise QuantizationError(
                "no LayerNorm is fed by Linear and Embedding layers alone",
                where="layernorm_to_rmsnorm",
                fix="Write layernorm_to_rmsnorm: false",
            )
        if config.merge_layernorm and config.rotation is None and not _norm_regions(view):
            raise QuantizationError(
                "no norm is followed by Linear layers alone",
                where="merge_layernorm",
                fix="Write merge_layernorm: false",
            )
        if config.rotation is None or config.rotation.mode == "layerwise":
            return
        if config.layernorm_to_rmsnorm:
            # What can be rotated is known when LayerNorms are gone.
            transform(copy.deepcopy(model), config, example, ())
            return
        if _equalization(config.rotation, set()).found(view):
            return
    norms = nn.LayerNorm in kinds
    fix = "layernorm_to_rmsnorm: true, or " if norms else ""
    raise QuantizationError(
        "no Linear layers are joined in a way that a rotation can pass",
        where="rotation",
        fix=f"Write {fix}rotation.mode: layerwise",
    )


def merge_norms(view: Any) -> None:
    """Let Linear layers take over weight and bias of the norm before them.

    Brevitas 0.13.4 has this, but divides a norm's bias by its weight once for each layer after
    it, which is right for one layer only.
    """
    for norm, layers in _norm_regions(view):
        bias = getattr(norm, "bias", None)
        for layer in layers:
            if bias is not None and bool(bias.any()):
                shift = layer.weight.double() @ bias.double()
                kept = 0.0 if layer.bias is None else layer.bias.double()
                layer.bias = nn.Parameter((shift + kept).to(layer.weight.dtype))
            layer.weight = nn.Parameter(layer.weight.detach() * norm.weight.detach())
        norm.weight.data.fill_(1.0)
        if bias is not None:
            bias.data.zero_()


def to_rms_norms(model: nn.Module, view: Any) -> None:
    """Take the mean out of what feeds LayerNorms, so that they need not."""
    centred: set[int] = set()
    for norm, sources in _layer_norms(view):
        if norm.bias is not None and bool(norm.bias.any()):
            continue  # RMSNorm has none
        for source in sources:
            if id(source) not in centred:
                centred.add(id(source))
                _centre(source)
        plain = nn.RMSNorm(norm.normalized_shape, eps=norm.eps)
        plain.weight = norm.weight
        names = [name for name, module in model.named_modules() if module is norm]
        for name in names:
            model.set_submodule(name, plain.train(norm.training))


def _centre(source: Any) -> None:
    axis = -1 if isinstance(source, nn.Embedding) else 0
    weight = source.weight.detach().double()
    source.weight = nn.Parameter((weight - weight.mean(axis, keepdim=True)).to(source.weight.dtype))
    if getattr(source, "bias", None) is not None:
        bias = source.bias.detach().double()
        source.bias = nn.Parameter((bias - bias.mean()).to(source.bias.dtype))


def _norm_regions(view: Any) -> list[tuple[Any, list[Any]]]:
    """Norms that only Linear layers follow, with these."""
    from brevitas.graph.equalize import _extract_regions

    regions = _extract_regions(
        view,
        state_impl_kwargs={
            "supported_srcs": (nn.LayerNorm, nn.RMSNorm),
            "supported_sinks": (nn.Linear,),
            "scale_invariant_layers": _PASSIVE,
            "scale_invariant_functions": (),
            "residual_fns": (),
            "residual_methods": (),
        },
    )
    found = []
    for region in regions:
        norms = [region.get_module_from_name(name) for name in region.srcs]
        layers = [region.get_module_from_name(name) for name in region.sinks]
        if len(norms) == 1 and norms[0].elementwise_affine:
            found.append((norms[0], layers))
    return found


def _layer_norms(view: Any) -> list[tuple[Any, list[Any]]]:
    """LayerNorms that only Linear and Embedding layers feed, with these."""
    from brevitas.graph.equalize import LayerNormToRMS, _extract_regions

    regions = _extract_regions(view, state_impl_kwargs=LayerNormToRMS().full_state_kwargs)
    return [
        (
            region.get_module_from_name(sink),
            [region.get_module_from_name(source) for source in region.srcs],
        )
        for region in regions
        for sink in region.sinks
    ]


class _Rotations:
    """Brevitas's rotations of a graph, found but not carried out."""

    def __init__(self, equalization: Any) -> None:
        self._equalization = equalization

    def found(self, view: Any) -> list[Any]:
        """The rewritings that rotate."""
        _, rewriters = self._equalization.apply(view)
        return list(rewriters)

    def permuted(
        self, view: Any, model: nn.Module, options: Rotation, example: Batch | None
    ) -> list[Any]:
        """The same, with channels put in order by the values of one sample before."""
        from brevitas.graph.permute import rotate_permute_mode

        if example is None:
            raise QuantizationError(
                "channels are ordered by values, and there are none",
                where="rotation.permute",
                fix="Give calibration data",
            )
        mode = rotate_permute_mode(
            view, self._equalization, block_size=options.block_size, permute_fn=options.permute
        )
        with torch.no_grad(), mode:
            example.first().run(model)
        return list(mode.rewriters)


def _equalization(options: Rotation, blacklist: set[str]) -> _Rotations:
    from brevitas.graph.equalize import GraphRotationEqualization

    return _Rotations(
        GraphRotationEqualization(
            blacklist_layers=sorted(blacklist),
            orphan_sink=options.online,
            sdpa_regions=options.sdpa_regions,
            full_rotation_method=_METHODS[options.matrix],
            return_rewriters=True,
            delay_rewriters=True,
            rotation_block_size=options.block_size,
        )
    )


def _rotate_graph(view: Any, options: Rotation, quantized: set[str], example: Batch | None) -> None:
    model = view.viewed_model if isinstance(view, GraphView) else view
    others = {name for name, _ in model.named_modules() if name not in quantized}
    rotations = _equalization(options, others)
    if options.permute is None:
        rewriters = rotations.found(view)
    else:
        rewriters = rotations.permuted(view, model, options, example)
    if not rewriters:
        raise QuantizationError(
            "no Linear layers are joined in a way that a rotation can pass",
            where="rotation",
            fix="Write rotation.mode: layerwise",
        )
    for rewriter in rewriters:
        rewriter.apply(model)
    for parameter in model.parameters():
        # Permuted ones are views, which some of Brevitas's algorithms cannot reshape.
        parameter.data = parameter.data.contiguous()
    _freeze(model)


def _rotate_layers(model: nn.Module, options: Rotation, quantized: set[str]) -> None:
    from brevitas.graph.equalize import LayerwiseActivationRotation

    others = [name for name, _ in model.named_modules() if name and name not in quantized]
    LayerwiseActivationRotation(
        blacklist_layer=others, rotation_block_size=options.block_size
    ).apply(model)
    _freeze(model)


def _freeze(model: nn.Module) -> None:
    """Hadamard matrices are constants; Brevitas makes parameters of them."""
    from brevitas.nn.equalized_layer import RotatedModule

    for module in model.modules():
        if isinstance(module, RotatedModule) and module.had_mat is not None:
            module.had_mat.requires_grad_(False)
