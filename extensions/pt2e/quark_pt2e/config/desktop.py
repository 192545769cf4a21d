"""XnnpackConfig and InductorConfig: quantizers whose programs run on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

from pydantic import model_validator

from quark_core.spec import LayerRule, ObserverName
from quark_core.support import Support
from quark_pt2e.config.specs import LIMITS, SpecConfig

_OBSERVERS: tuple[ObserverName, ...] = ("minmax", "moving_average", "mse")


class XnnpackConfig(SpecConfig):
    """ExecuTorch's XNNPACKQuantizer: 8-bit convolutions, linear layers, additions on CPUs.

    Dynamic inputs (``int8/dynamic``) quantize linear layers and convolutions alone.
    """

    supports: ClassVar[Sequence[Support]] = (
        Support(("weight",), ("int8",), ("tensor", "channel")),
        Support(("input", "output"), ("int8",), symmetric=(False,), observer=_OBSERVERS),
        Support(("input",), ("int8",), symmetric=(False,), observer=(), dynamic=(True,)),
    )
    own_arguments: ClassVar[tuple[str, ...]] = LIMITS

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        _check(self)
        return self


class X86InductorConfig(SpecConfig):
    """torchao's X86InductorQuantizer: 8-bit layers for torch.compile on x86 CPUs.

    The hardware reads unsigned activations; an asymmetric ``int8`` is the same grid, shifted by
    128, and becomes ``uint8``.
    """

    supports: ClassVar[Sequence[Support]] = (
        Support(("weight",), ("int8",), ("channel",)),
        Support(("input", "output"), ("int8", "uint8"), symmetric=(False,), observer=_OBSERVERS),
        Support(("input",), ("int8", "uint8"), symmetric=(False,), observer=(), dynamic=(True,)),
    )
    own_arguments: ClassVar[tuple[str, ...]] = ("reduce_range",)

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        _check(self)
        modes = {
            spec.dynamic
            for _, holder in _places(self)
            if (spec := self.effective(holder, "input")) is not None
        }
        if len(modes) > 1:
            raise ValueError("rules: this quantizer cannot mix static and dynamic inputs")
        return self


class ArmInductorConfig(SpecConfig):
    """torchao's ArmInductorQuantizer: 8-bit layers for torch.compile on Arm CPUs."""

    supports: ClassVar[Sequence[Support]] = (
        Support(("weight",), ("int8",), ("tensor",)),
        Support(("input", "output"), ("int8",), symmetric=(False,), observer=_OBSERVERS),
        Support(("input",), ("int8",), symmetric=(False,), observer=(), dynamic=(True,)),
    )

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        _check(self)
        return self


def _places(config: SpecConfig) -> list[tuple[str, SpecConfig | LayerRule]]:
    return [("", config), *((f"rules[{i}].", rule) for i, rule in enumerate(config.rules))]


def _check(config: SpecConfig) -> None:
    """Refuse what these quantizers would only find out about in the middle."""
    for place, holder in _places(config):
        if isinstance(holder, LayerRule) and holder.skip:
            continue
        weight, read = config.effective(holder, "weight"), config.effective(holder, "input")
        if (weight is None) != (read is None):
            missing = "weight" if weight is None else "input"
            raise ValueError(
                f"{place}{missing}: this quantizer takes weight and input together: give both, "
                "or skip: true"
            )
        made = config.effective(holder, "output")
        if read is not None and made is not None and made.format != read.format:
            raise ValueError(f"{place}output: must be as input, or left out")
