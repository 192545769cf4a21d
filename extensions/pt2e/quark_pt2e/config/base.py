"""What all PT2E backends can be told: how to export, calibrate and observe."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from quark_core.config import QuantizationConfig
from quark_core.spec import FrozenModel


class Settle(FrozenModel):
    """When calibration may stop early: ranges no longer move.

    Attributes:
        tolerance: Largest relative change of any range that still counts as standing still.
        patience: How many batches in a row must stand still.
    """

    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.01
    patience: Annotated[int, Field(gt=0)] = 4


class Pt2eConfig(QuantizationConfig):
    """Quantization of an exported program: annotate, observe, convert."""

    batch: Literal["auto", "dynamic", "static"] = Field(
        default="auto",
        description="Export for any batch size (dynamic), for one sample (static; batches are "
        "then cut up), or the first that works (auto).",
    )
    strict: bool | None = Field(
        default=None,
        description="Export by tracing bytecode; by default only where branches need it to keep "
        "the names of their layers.",
    )
    branches: Literal["quantized", "float"] = Field(
        default="quantized",
        description="What becomes of the branches of torch.cond; float is what calling "
        "prepare_pt2e yourself gives.",
    )
    qat: bool = Field(
        default=False,
        description="Make a module with fake quantizers to be trained in a loop of your own; "
        "what is saved and exported is converted from it.",
    )
    settle: Settle | None = Field(
        default=None, description="Stop observing once ranges stand still; null observes all data."
    )

    @model_validator(mode="after")
    def _trained_in_batches(self) -> Self:
        if self.qat and self.batch == "static":
            raise ValueError("qat: training needs batches: drop batch: static")
        return self

    check_samples: int = Field(
        default=200,
        gt=0,
        description="Most evaluation samples on which an export is compared with its origin.",
    )
