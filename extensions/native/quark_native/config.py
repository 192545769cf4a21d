"""NativeConfig: what quark-native can do, as a table, and its own options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from quark_core.config import QuantizationConfig
from quark_core.spec import Role, ScaleFormat, TensorSpec
from quark_core.support import Support
from quark_native.limits import BFP, FLOATS, INTEGERS, MX, refusal

_SCALES: tuple[ScaleFormat, ...] = ("float32", "power_of_two")
_ACTIVATIONS: tuple[Role, ...] = ("input", "output")


def _affine(formats: tuple[str, ...], symmetric: tuple[bool, ...]) -> tuple[Support, ...]:
    """The rows of formats whose scales come from ranges."""
    return (
        Support(
            ("weight",),
            formats,
            ("tensor", "channel", "group"),
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


class NativeConfig(QuantizationConfig):
    """Configuration of quark-native.

    Weights, inputs, outputs and biases of Linear, Conv1d, Conv2d, ConvTranspose1d,
    ConvTranspose2d and Embedding layers. Ranges of inputs and outputs are calibrated, or
    measured anew from each tensor if dynamic; MX and BFP formats measure each block by
    definition.
    """

    supports: ClassVar[Sequence[Support] | None] = (
        *_affine(INTEGERS, (True, False)),
        *_affine(FLOATS, (True,)),
        Support(
            ("weight", *_ACTIVATIONS),
            (*MX, *BFP),
            ("group",),
            scale=("e8m0",),
            observer=(),
            dynamic=(False, True),
        ),
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
