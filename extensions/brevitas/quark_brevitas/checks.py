"""What a configuration's options forbid each other; each function raises ValueError."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quark_brevitas.options import LearnedRound, fused_option
from quark_core.support import misfit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quark_brevitas.config import BrevitasConfig
    from quark_core.config import QuantizationConfig
    from quark_core.spec import LayerRule, TensorSpec


def inputs(
    config: BrevitasConfig, places: Sequence[tuple[str, QuantizationConfig | LayerRule]]
) -> None:
    """Refuse options on inputs that have no inputs to act on."""
    integer = config.input is not None and config.input.number_format.family == "integer"
    if not config.unsigned_relu and not (
        config.backend == "fx" and integer and config.input is not None and config.input.symmetric
    ):
        raise ValueError(
            "unsigned_relu: false concerns symmetric integer inputs of fx: leave it out, as "
            "layerwise takes int8 and uint8 as they are written"
        )
    if not config.unscaled_inputs:
        return
    specs = [
        (place, spec)
        for place, holder in places
        if (spec := getattr(holder, "input", None)) is not None
    ]
    for place, spec in specs:
        if spec.number_format.family != "float" or spec.dynamic or spec.scale != "float32":
            raise ValueError(
                f"{place}input: unscaled_inputs rounds static minifloats, not {spec}: write "
                "fp8_e4m3, or unscaled_inputs: false"
            )
        if spec.observer is not None and spec.observer.name != "minmax":
            raise ValueError(
                f"{place}input: unscaled_inputs looks at no values: leave {spec.observer} out"
            )
    if not specs:
        raise ValueError("unscaled_inputs: no input is quantized: give input, such as fp8_e4m3")


def attention(config: BrevitasConfig) -> None:
    """Refuse attention specs that Brevitas's attention has no quantizers for."""
    options = config.attention
    if options is None:
        return
    try:
        spec = options.spec.resolve("input")
    except ValueError as error:
        raise ValueError(f"attention.spec: {error}") from None
    found = misfit(spec, "input", config.supports, config.name)
    problem = found[1] if found is not None else config.refuses(spec, "input")
    if problem is not None:
        raise ValueError(f"attention.spec: {problem}")
    if spec.granularity is None or spec.granularity.kind not in ("tensor", "token"):
        raise ValueError(
            f"attention.spec: keys are transposed within attention, where {spec.granularity} "
            f"scales have no place: write {spec.format}/tensor, or {spec.format}/token/dynamic"
        )
    if spec.number_format.family == "integer" and not spec.number_format.signed:
        raise ValueError(
            "attention.spec: queries and keys are negative too: write "
            f"{spec.format.removeprefix('u')}, and softmax is unsigned all the same"
        )


def rotation(config: BrevitasConfig, weights: bool) -> None:
    """Refuse rotations that their surroundings do not allow."""
    if config.layernorm_to_rmsnorm and not config.merge_layernorm:
        raise ValueError(
            "layernorm_to_rmsnorm: RMSNorm has no bias to keep LayerNorm's in: write "
            "merge_layernorm: true too"
        )
    options = config.rotation
    if options is None:
        return
    if not weights:
        raise ValueError(
            "rotation works on weights that are quantized: give weight a spec, such as int4/channel"
        )
    if options.mode == "layerwise":
        if options.matrix == "orthogonal":
            raise ValueError(
                "rotation.matrix: Brevitas rotates at run time by Hadamard matrices only: "
                "write matrix: hadamard, or mode: fused"
            )
        if options.sdpa_regions or options.online:
            given = "sdpa_regions" if options.sdpa_regions else "online"
            raise ValueError(
                f"rotation.{given}: mode layerwise rotates before every layer as it is: leave "
                f"{given} out, or write mode: fused"
            )
    if options.mode == "layerwise" and options.permute:
        raise ValueError(
            "rotation.permute: layerwise has no layers before to permute: write mode: fused"
        )
    if options.permute and options.block_size is None:
        raise ValueError(
            "rotation.permute: an order matters to rotations in blocks only: give "
            "block_size, such as 32"
        )
    if options.block_size is not None and options.matrix == "orthogonal":
        raise ValueError(
            "rotation.block_size: Brevitas rotates blocks by Hadamard matrices only: write "
            "matrix: hadamard"
        )
    if options.mode != "layerwise" and not config.merge_layernorm:
        raise ValueError(
            f"rotation.mode: {options.mode} rotates what norms see, so norms must not weigh "
            "channels: write merge_layernorm: true too, or mode: layerwise"
        )
    if config.backend == "fx" and (options.mode == "layerwise" or options.online):
        raise ValueError(
            "rotation: fx cannot see through rotations at run time: write mode: fx without "
            "online, or backend: layerwise"
        )


def awq(config: BrevitasConfig, weights: bool) -> None:
    """Refuse factors where they have no weights, or no place."""
    if config.awq is None:
        return
    if not weights:
        raise ValueError("awq: no weight is quantized: give weight, such as int4/group:64")
    if config.activation_equalization is not None:
        raise ValueError(
            "awq and activation_equalization both scale input channels: leave one of them out"
        )
    if config.backend == "fx":
        raise ValueError(
            "awq: fx cannot see through the factors before layers: write backend: layerwise"
        )


def folding(config: BrevitasConfig) -> None:
    """Refuse to fold factors where something stands before every layer at run time."""
    option = fused_option(config)
    if option and config.rotation is not None and config.rotation.mode == "layerwise":
        raise ValueError(
            f"{option}: rotation.mode: layerwise rotates before every layer, so nothing before can "
            f"take over factors: write {option}: layerwise, or rotation.mode: fused"
        )


def low_rank(config: BrevitasConfig, weights: bool) -> None:
    """Refuse float branches where they have no weights, or no place."""
    if config.low_rank is None:
        return
    if not weights:
        raise ValueError("low_rank: no weight is quantized: give weight, such as int4/group:64")
    if config.backend == "fx":
        raise ValueError(
            "low_rank: fx would quantize the float branch's sums: write backend: layerwise"
        )
    if config.bias_correction:
        raise ValueError(
            "low_rank: Brevitas corrects a bias for a layer's own output, without the branch "
            "beside it: write bias_correction: false"
        )


def learned_round(config: BrevitasConfig, weights: Sequence[tuple[str, TensorSpec]]) -> None:
    """Refuse blocks and scales that cannot learn."""
    options = config.algorithm
    if not isinstance(options, LearnedRound):
        return
    if options.blocks is not None and config.backend == "fx":
        raise ValueError(
            "algorithm.blocks: a traced graph has no blocks left: write backend: layerwise, or "
            "leave blocks out"
        )
    if not options.learn_scale:
        return
    if config.hqo:
        raise ValueError("algorithm.learn_scale: hqo fixes scales: leave one of them out")
    for place, spec in weights:
        if spec.symmetric is False:
            raise ValueError(
                f"{place}weight: the zero points of {spec} hang on its scales: write sym, or "
                "algorithm.learn_scale: false"
            )
        if spec.scale not in (None, "float32"):
            raise ValueError(
                f"{place}weight: {spec.scale} scales cannot move a little: write a format with "
                "float32 scales, or algorithm.learn_scale: false"
            )
