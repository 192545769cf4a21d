"""Quantizers whose programs run on this machine: XNNPACK and Inductor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torchao.quantization.pt2e.quantizer import QuantizationConfig, Quantizer
from torchao.quantization.pt2e.quantizer.arm_inductor_quantizer import ArmInductorQuantizer
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

from quark_core.spec import LayerRule, TensorSpec
from quark_pt2e import observing
from quark_pt2e.backends.grouped import GroupedBackend
from quark_pt2e.config.desktop import ArmInductorConfig, X86InductorConfig, XnnpackConfig
from quark_pt2e.config.specs import SpecConfig
from quark_pt2e.model import lazily

ConfigT = TypeVar("ConfigT", bound=SpecConfig)

_FLOOR = 2**-12
"""Smallest scale, as all three quantizers choose it."""


class _Desktop(GroupedBackend[ConfigT]):
    """What the three have in common."""

    activations: ClassVar[tuple[torch.dtype, int, int]] = (torch.int8, -128, 127)
    lowest_weight: ClassVar[int] = -128

    def translated(self, rule: LayerRule | None) -> QuantizationConfig | None:
        """Torchao's configuration for a rule; None leaves it float."""
        config, holder = self.config, rule or self.config
        weight, read = config.effective(holder, "weight"), config.effective(holder, "input")
        if weight is None or read is None:
            return None
        made = None if read.dynamic else config.effective(holder, "output")
        return QuantizationConfig(
            self._activation(read),
            None if made is None else self._activation(made),
            observing.weight(
                weight,
                torch.int8,
                (self.lowest_weight, 127),
                floor=_FLOOR,
                qat=config.qat,
                follows=True,
            ),
            None,
            config.qat,
        )

    def _activation(self, spec: TensorSpec) -> Any:
        dtype, low, high = self.activations
        return observing.activation(
            spec,
            dtype,
            (low, high),
            floor=self.config.scale_floor or _FLOOR,
            headroom=self.config.headroom,
            qat=self.config.qat,
        )


class XnnpackBackend(_Desktop[XnnpackConfig]):
    """ExecuTorch's XNNPACKQuantizer."""

    config_class = XnnpackConfig
    lowest_weight = -127
    exports: ClassVar[Mapping[str, Any]] = {
        "xnnpack": lazily("quark_pt2e.lowering.xnnpack:export"),
    }

    def one(self, rule: LayerRule | None) -> Quantizer | None:
        """XNNPACKQuantizer with one configuration for all it sees."""
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer

        found = self.translated(rule)
        return None if found is None else XNNPACKQuantizer().set_global(found)

    def describe(self) -> str:
        """XNNPACKQuantizer."""
        return "XNNPACKQuantizer"


class X86InductorBackend(_Desktop[X86InductorConfig]):
    """torchao's X86InductorQuantizer."""

    config_class = X86InductorConfig
    activations = (torch.uint8, 0, 255)
    exports: ClassVar[Mapping[str, Any]] = {
        "inductor": lazily("quark_pt2e.lowering.inductor:export"),
    }

    def one(self, rule: LayerRule | None) -> Quantizer | None:
        """X86InductorQuantizer with one configuration for all it sees."""
        found = self.translated(rule)
        return None if found is None else X86InductorQuantizer().set_global(found)

    def describe(self) -> str:
        """X86InductorQuantizer."""
        return "X86InductorQuantizer"


class ArmInductorBackend(_Desktop[ArmInductorConfig]):
    """torchao's ArmInductorQuantizer."""

    config_class = ArmInductorConfig

    def one(self, rule: LayerRule | None) -> Quantizer | None:
        """ArmInductorQuantizer with one configuration for all it sees."""
        found = self.translated(rule)
        return None if found is None else ArmInductorQuantizer().set_global(found)

    def describe(self) -> str:
        """ArmInductorQuantizer."""
        return "ArmInductorQuantizer"
