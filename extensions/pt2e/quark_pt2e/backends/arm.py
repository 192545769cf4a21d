"""Arm's quantizers for Ethos-U, VGF and TOSA."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from executorch.backends.arm.quantizer import (
    EthosUQuantizer,
    TOSAQuantizer,
    VgfQuantizer,
    get_symmetric_quantization_config,
)
from executorch.backends.arm.quantizer.arm_quantizer_utils import NodeFinder
from executorch.backends.arm.quantizer.quantization_config import TOSAQuantizationConfig
from executorch.backends.cortex_m.quantizer.node_finders import InputNodeFinder, OutputNodeFinder
from torch import fx

from quark_core.selection import select
from quark_core.spec import LayerRule, Role, TensorSpec
from quark_pt2e import observing
from quark_pt2e.backends.devices import compile_spec
from quark_pt2e.config.arm import ArmConfig, EthosUConfig, TosaConfig, VgfConfig
from quark_pt2e.graph.naming import Namer
from quark_pt2e.model import lazily
from quark_pt2e.quantizer import Pt2eQuantizer

ConfigT = TypeVar("ConfigT", bound=ArmConfig)

_FLOORS = {8: 2**-16, 16: 2**-12}
"""Smallest scale by width of the activations, as ExecuTorch chooses it."""


class ArmBackend(Pt2eQuantizer[ConfigT]):
    """What the three have in common; a subclass says which device is meant."""

    @abstractmethod
    def empty(self, spec: Any) -> TOSAQuantizer:
        """Arm's quantizer, without any configuration."""

    def build(self, namer: Namer) -> TOSAQuantizer:
        """Arm's quantizer with our rules: later calls come before earlier ones, as ours do."""
        quantizer = self.empty(compile_spec(self.config))
        if (common := self.translated(None)) is not None:
            # set_global(None) would also cut off operations that share their neighbours' ranges.
            quantizer.set_global(common)
        if self.config.precedence == "executorch":
            self._as_theirs(quantizer, namer)
            return quantizer
        for index, rule in enumerate(self.config.rules):
            # The finder asks which rule decides a node, so theirs can come in any order.
            finder = _Decided(namer, self.config, index)
            quantizer.quantizer.set_node_finder(self.translated(rule), finder)
        return quantizer

    def translated(self, rule: LayerRule | None) -> TOSAQuantizationConfig | None:
        """Arm's configuration for a rule, or for what no rule matches; None leaves it float."""
        config = self.config
        if rule is not None and rule.skip:
            return None
        roles: tuple[Role, ...] = ("weight", "input", "output")
        specs = {role: config.effective(rule or config, role) for role in roles}
        if not any(specs.values()):
            return None
        bits = specs["input"].number_format.bits if specs["input"] else 8
        weight = specs["weight"]
        return TOSAQuantizationConfig(
            self._activation(specs["input"]),
            self._activation(specs["output"]),
            self._weight(weight, bits),
            # Arm derives the bias's scale itself, whatever stands here.
            _derived_bias() if weight is not None else None,
            self.config.name if rule is None else rule.describe(),
        )

    def limits(self, spec: TensorSpec) -> tuple[int, int]:
        """Smallest and largest code of an activation."""
        bits = spec.number_format.bits
        if spec.format == "uint8":
            return 0, 255
        return (-(2 ** (bits - 1)) + bool(spec.symmetric), 2 ** (bits - 1) - 1)

    def _activation(self, spec: TensorSpec | None) -> Any:
        if spec is None:
            return None
        bits = spec.number_format.bits
        dtype = {"uint8": torch.uint8, "int8": torch.int8, "int16": torch.int16}[spec.format]
        floor = self.config.scale_floor or _FLOORS[bits]
        return observing.activation(
            spec,
            dtype,
            self.limits(spec),
            floor=floor,
            headroom=self.config.headroom,
            qat=self.config.qat,
        )

    def _weight(self, spec: TensorSpec | None, bits: int) -> Any:
        if spec is None:
            return None
        top = 2 ** (spec.number_format.bits - 1) - 1
        return observing.weight(
            spec, torch.int8, (-top, top), floor=_FLOORS[8], qat=self.config.qat
        )

    def _as_theirs(self, quantizer: TOSAQuantizer, namer: Namer) -> None:
        for rule in self.config.rules:
            config = self.translated(rule)
            if rule.name is not None:
                quantizer.set_module_name(rule.name, config)
            elif rule.type is not None:
                quantizer.set_module_type(namer.class_named(rule.type), config)
            elif self.config.composable:
                finder = InputNodeFinder() if rule.io == "input" else OutputNodeFinder()
                quantizer.quantizer.set_node_finder(config, finder)
            else:
                quantizer.set_io(config)


class EthosUBackend(ArmBackend[EthosUConfig]):
    """Arm's EthosUQuantizer."""

    config_class = EthosUConfig
    exports: ClassVar[Mapping[str, Any]] = {
        "ethos-u": lazily("quark_pt2e.lowering.ethosu:export"),
        "tosa": lazily("quark_pt2e.lowering.tosa:export"),
    }

    def empty(self, spec: Any) -> EthosUQuantizer:
        """EthosUQuantizer."""
        return EthosUQuantizer(spec, use_composable_quantizer=self.config.composable)

    def describe(self) -> str:
        """EthosUQuantizer."""
        return "EthosUQuantizer"


class TosaBackend(ArmBackend[TosaConfig]):
    """Arm's TOSAQuantizer."""

    config_class = TosaConfig
    exports: ClassVar[Mapping[str, Any]] = {"tosa": lazily("quark_pt2e.lowering.tosa:export")}

    def empty(self, spec: Any) -> TOSAQuantizer:
        """TOSAQuantizer."""
        return TOSAQuantizer(spec, use_composable_quantizer=self.config.composable)

    def describe(self) -> str:
        """TOSAQuantizer."""
        return "TOSAQuantizer"


class VgfBackend(ArmBackend[VgfConfig]):
    """Arm's VgfQuantizer."""

    config_class = VgfConfig
    exports: ClassVar[Mapping[str, Any]] = {
        "vgf": lazily("quark_pt2e.lowering.vgf:export"),
        "tosa": lazily("quark_pt2e.lowering.tosa:export"),
    }

    def empty(self, spec: Any) -> VgfQuantizer:
        """VgfQuantizer."""
        return VgfQuantizer(spec, use_composable_quantizer=self.config.composable)

    def describe(self) -> str:
        """VgfQuantizer."""
        return "VgfQuantizer"

    def limits(self, spec: TensorSpec) -> tuple[int, int]:
        """Without -128 for signed normalised images."""
        low, high = super().limits(spec)
        return (-127, 127) if self.config.snorm and spec.format == "int8" else (low, high)

    def translated(self, rule: LayerRule | None) -> Any:
        """VGF's own class of configuration, which knows operations that TOSA's does not."""
        from executorch.backends.arm.quantizer.quantization_config import VGFQuantizationConfig

        found = super().translated(rule)
        if found is None:
            return None
        return VGFQuantizationConfig(
            found.input_activation, found.output_activation, found.weight, found.bias, found.label
        )


class _Decided(NodeFinder):  # type: ignore[misc]
    """Finds the nodes that one rule decides."""

    def __init__(self, namer: Namer, config: ArmConfig, index: int) -> None:
        self._namer, self._config, self._index = namer, config, index

    def find_nodes(self, model: fx.GraphModule) -> Iterator[fx.Node]:
        sites = self._namer.sites(model)
        decisions = select([site.target for site in sites], self._config).decisions
        own = set(model.graph.nodes)
        return iter(
            [
                site.node
                for site in sites
                if site.node in own and decisions[site.target.name].rule == self._index
            ]
        )

    def __repr__(self) -> str:
        return f"nodes decided by rules[{self._index}]"


@functools.cache
def _derived_bias() -> Any:
    return get_symmetric_quantization_config().bias
