"""NativeConfig: what quark-native can do, as a table, and its own options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from quark_core.config import QuantizationConfig
from quark_core.spec import Role, ScaleFormat, TensorSpec
from quark_core.support import ROUNDINGS, Support
from quark_native.limits import (
    BLOCK_LOG,
    FLOAT_BLOCKS,
    FLOATS,
    INTEGERS,
    MEANS,
    MX,
    POWER_BLOCKS,
    UNSCALED,
    refusal,
)

_SCALES: tuple[ScaleFormat, ...] = ("float32", "power_of_two")
_ACTIVATIONS: tuple[Role, ...] = ("input", "output")


def _affine(
    formats: tuple[str, ...], symmetric: tuple[bool, ...], narrow: tuple[bool, ...] = (False,)
) -> Iterator[Support]:
    """The rows of formats whose scales come from ranges."""
    rows = (
        Support(
            ("weight",),
            formats,
            ("tensor", "channel", "group", "block"),
            symmetric,
            _SCALES,
            ("minmax", "percentile", "mse"),
        ),
        Support(("bias",), formats, ("tensor", "channel"), symmetric, _SCALES, ("minmax", "mse")),
        Support(
            _ACTIVATIONS,
            formats,
            ("tensor",),
            symmetric,
            _SCALES,
            ("minmax", "moving_average", "percentile", "mse"),
        ),
        Support(
            _ACTIVATIONS, formats, ("channel",), symmetric, _SCALES, ("minmax", "moving_average")
        ),
        Support(
            _ACTIVATIONS,
            formats,
            ("tensor", "channel", "token", "group"),
            symmetric,
            _SCALES,
            observer=(),
            dynamic=(True,),
        ),
    )
    for row in rows:
        yield replace(row, rounding=ROUNDINGS, narrow=narrow)


def _measured(
    formats: tuple[str, ...], granularity: tuple[str, ...], scale: ScaleFormat
) -> Support:
    """The row of formats that take their scales from each tensor itself."""
    return Support(
        ("weight", *_ACTIVATIONS),
        formats,
        granularity,
        scale=(scale,),
        observer=(),
        rounding=ROUNDINGS,
        dynamic=(False, True),
    )


class NativeConfig(QuantizationConfig):
    """Configuration of quark-native.

    Weights, inputs, outputs and biases of Linear, Conv1d, Conv2d, ConvTranspose1d,
    ConvTranspose2d and Embedding layers. Ranges of inputs and outputs are calibrated, or
    measured anew from each tensor if dynamic; block formats measure each block by definition.
    """

    supports: ClassVar[Sequence[Support] | None] = (
        *_affine(INTEGERS, (True, False), narrow=(False, True)),
        *_affine(FLOATS, (True,)),
        _measured((*FLOATS, *UNSCALED), ("tensor",), "unit"),
        *(
            _measured(MEANS, ("tensor", "channel", "group", "block"), scale)
            for scale in ("float32", "unit")
        ),
        replace(_measured(MX, ("group",), "e8m0"), scale_rule=("floor", "ceil", "even", "rceil")),
        _measured((*POWER_BLOCKS, *BLOCK_LOG), ("group",), "e8m0"),
        *(_measured(formats, ("group",), scale) for scale, formats in FLOAT_BLOCKS.items()),
    )

    keep_float: bool = Field(
        default=True,
        description="Keep float weights beside the quantized ones, so that layers can be switched "
        "to float and back.",
    )

    @classmethod
    def refuses(cls, spec: TensorSpec, role: Role) -> str | None:
        """Limits of generic formats that the table cannot say."""
        return refusal(spec)
