"""What stands beside the specs in a configuration: algorithms and passes, by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from quark_core.spec import FrozenModel, TensorSpec

Engine = Literal["fast", "brevitas"]
_ENGINE = (
    "fast solves with each quantizer's scales taken out once; brevitas runs Brevitas's own code, "
    "several times slower."
)


class Accumulator(FrozenModel):
    """Keep sums of products of codes within an integer register, whatever the inputs are (AXE)."""

    bits: int = Field(ge=8, le=32, description="Bits of the register, sign included.")
    tile: int | None = Field(
        default=None,
        ge=2,
        description="Products summed up in one register; null is all of a dot product.",
    )


class GPTQ(FrozenModel):
    """Round column by column, moving the rest of a row to make up for each error."""

    name: Literal["gptq"] = "gptq"
    act_order: bool = Field(default=False, description="Columns with the largest inputs first.")
    quantized_inputs: bool = Field(
        default=False, description="Look at inputs as quantized layers see them."
    )
    damping: float = Field(
        default=0.01, gt=0, le=1, description="Added to the diagonal, as a share of its mean."
    )
    accumulator: Accumulator | None = Field(
        default=None, description="Limit sums of products to an integer register."
    )
    engine: Engine = Field(default="fast", description=_ENGINE)


class GPFQ(FrozenModel):
    """Round column by column, following the float layer's outputs on quantized inputs."""

    name: Literal["gpfq"] = "gpfq"
    act_order: bool = Field(default=False, description="Columns with the largest inputs first.")
    accumulator: Accumulator | None = Field(
        default=None, description="Limit sums of products to an integer register."
    )
    engine: Engine = Field(default="fast", description=_ENGINE)


class Qronos(FrozenModel):
    """Correct what earlier layers did wrong, then round as GPTQ does."""

    name: Literal["qronos"] = "qronos"
    act_order: bool = Field(default=True, description="Columns with the largest inputs first.")
    alpha: float = Field(
        default=1e-6, gt=0, description="Damping, as a share of the largest singular value."
    )
    engine: Engine = Field(default="fast", description=_ENGINE)


class LearnedRound(FrozenModel):
    """Learn for each weight whether to round it up or down, layer by layer or block by block."""

    name: Literal["learned_round"] = "learned_round"
    function: Literal["hard_sigmoid", "sigmoid", "identity"] = Field(
        default="hard_sigmoid", description="What turns the learned numbers into roundings."
    )
    blocks: str | None = Field(
        default=None,
        description="Name of the module whose children learn as wholes, such as model.layers; "
        "layers elsewhere keep nearest codes. Null is layer by layer.",
    )
    iterations: int = Field(
        default=1000, ge=1, description="Steps of the optimizer for a layer or block."
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="Of Adam.")
    learn_scale: bool = Field(default=False, description="Learn scales beside roundings.")
    scale_learning_rate: float = Field(default=1e-4, gt=0, description="Of the scales.")
    batch_size: int = Field(
        default=8, ge=1, description="Samples in one step; with blocks a step has one batch."
    )


class ActivationEqualization(FrozenModel):
    """SmoothQuant: move the size of inputs into weights, channel by channel."""

    mode: Literal["layerwise", "fx", "fused"] = Field(
        default="layerwise",
        description="layerwise multiplies before each layer; fused folds the factors into the norm "
        "or layer before, found on the graph of one call; fx folds them too, and needs tracing.",
    )
    alpha: float = Field(
        default=0.5, ge=0, le=1, description="How much moves: 0 nothing, 1 all of it."
    )


class MagR(FrozenModel):
    """Shrink the largest weights where that does not change outputs, before quantizing."""

    alpha: float = Field(default=0.01, gt=0, description="Weight of the penalty on magnitudes.")
    steps: int = Field(default=200, ge=1, description="Gradient steps for a layer.")


class AWQ(FrozenModel):
    """Multiply up the input channels of weights that matter most, before quantizing."""

    mode: Literal["layerwise", "fused"] = Field(
        default="layerwise",
        description="layerwise divides before each layer; fused folds the factors into the norm or "
        "layer before where there is one, found on the graph of one call.",
    )
    steps: int = Field(default=20, ge=2, description="How many factors are tried a layer.")


class LowRank(FrozenModel):
    """SVDQuant: keep the largest directions of each Linear weight float, and quantize the rest."""

    rank: int = Field(default=32, ge=1, description="Rank of the float branch beside a layer.")
    iterations: int = Field(
        default=1,
        ge=1,
        description="How often the branch is taken anew from what quantizing left; the best is "
        "kept.",
    )


class Rotation(FrozenModel):
    """Rotate what layers receive, and their weights to match: outliers spread over channels."""

    mode: Literal["layerwise", "fx", "fused"] = Field(
        default="fused",
        description="fused rotates the weights around the residual stream, found on the graph of "
        "one call; fx does that on a traced graph; layerwise rotates before each layer at run "
        "time.",
    )
    matrix: Literal["hadamard", "orthogonal"] = Field(
        default="hadamard", description="The rotation; orthogonal ones are random."
    )
    sdpa_regions: bool = Field(
        default=False, description="Rotate values within each attention head too."
    )
    online: bool = Field(
        default=False,
        description="Rotate the layers left over at run time, as layerwise does.",
    )
    block_size: int | None = Field(
        default=None,
        ge=2,
        description="Rotate so many channels at a time, where they divide a width; null is all.",
    )
    permute: Literal["massdiff", "zigzag", "absmax", "random"] | None = Field(
        default=None,
        description="Order channels first, so that blocks share outliers evenly; needs block_size.",
    )


class Attention(FrozenModel):
    """Quantize what scaled dot-product attention multiplies."""

    spec: TensorSpec = Field(
        default_factory=lambda: TensorSpec.model_validate("int8/sym"),
        description="Of queries, keys, values and softmax: a spec as for inputs, one scale a "
        "tensor.",
    )
    tensors: Literal["qkvs", "qkv", "kv"] = Field(
        default="qkvs", description="q queries, k keys, v values, s the softmax's output."
    )
    mode: Literal["functional", "fx"] = Field(
        default="functional",
        description="functional leads each block's calls to a module; fx makes a module of each "
        "call in a traced graph.",
    )


_OTHERS = {
    "awq": "AWQ comes before an algorithm: write awq: {}",
    "svdquant": "SVDQuant comes before an algorithm: write low_rank: {rank: 32}",
    "gpfa2q": "GPFA2Q is GPFQ within an accumulator: write algorithm: {name: gpfq, accumulator: "
    "{bits: 16}}",
    "hqo": "HQO searches scales, not codes: write hqo: true",
    "magr": "MagR comes before an algorithm: write magr: {}",
    "adaround": "AdaRound is learned rounding: write algorithm: learned_round",
}
"""What users of Brevitas may look for here, and what to write instead."""

INSTEAD = {
    **{name: f"algorithm: {name}" for name in ("gptq", "gpfq", "qronos", "learned_round")},
    "gpfa2q": "algorithm: {name: gpfq, accumulator: {bits: 16}}",
    "adaround": "algorithm: learned_round",
    "act_order": "algorithm: {name: gptq, act_order: true}",
    "smoothquant": "activation_equalization: {alpha: 0.5}",
    "svdquant": "low_rank: {rank: 32}",
    "quarot": "merge_layernorm: true and rotation: {}",
    "hadamard": "merge_layernorm: true and rotation: {}",
    "graph_equalization": "equalize_iterations: 20",
    "percentile": "input: int8/percentile:99.99",
    "bits": "weight: int8",
    "bit_width": "weight: int8",
    "group_size": "weight: int4/group:64",
    "symmetric": "weight: int8/sym or weight: int8/asym",
    "exclude": "rules: [{name: LAYER, skip: true}]",
}
"""The same for fields of the configuration."""


def _by_name(value: Any) -> Any:
    named = {"name": value} if isinstance(value, str) else value
    name = named.get("name") if isinstance(named, dict) else None
    if name in _OTHERS:
        raise ValueError(_OTHERS[name])
    return named


Algorithm = Annotated[
    Annotated[GPTQ | GPFQ | Qronos | LearnedRound, Field(discriminator="name")],
    BeforeValidator(_by_name, json_schema_input_type=str | GPTQ | GPFQ | Qronos | LearnedRound),
]
"""One algorithm; its name alone takes the defaults."""

TWO_STREAMS = ("gpfq", "qronos")
"""Algorithms that compare quantized with float inputs."""


def accumulator_of(algorithm: Algorithm | None) -> Accumulator | None:
    """The register an algorithm keeps to, if any."""
    return algorithm.accumulator if isinstance(algorithm, GPTQ | GPFQ) else None


def fused_option(config: Any) -> str:
    """The option of a configuration that asks for factors to be folded, or an empty string."""
    for name in ("activation_equalization", "awq"):
        if (given := getattr(config, name)) is not None and given.mode == "fused":
            return f"{name}.mode"
    return ""
