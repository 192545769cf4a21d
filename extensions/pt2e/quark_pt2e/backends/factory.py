"""Quantizers in their own terms: presets by name, and any by its import path."""

from __future__ import annotations

import importlib
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from torchao.quantization.pt2e.quantizer import Quantizer

from quark_core.batch import Batch
from quark_core.errors import MissingDependencyError, QuantizationError, did_you_mean
from quark_core.plan import Plan
from quark_core.spec import LayerRule
from quark_pt2e.backends.grouped import GroupedBackend
from quark_pt2e.config.factory import FactoryConfig, OwnTermsConfig, Part, PresetConfig
from quark_pt2e.graph.grouping import InOrder
from quark_pt2e.model import lazily
from quark_pt2e.quantizer import Export

ConfigT = TypeVar("ConfigT", bound=OwnTermsConfig)


class _OwnTerms(GroupedBackend[ConfigT]):
    """Makes one quantizer for all that is not skipped."""

    def one(self, rule: LayerRule | None) -> Quantizer | None:
        """The quantizer, unless the rule skips."""
        return None if rule is not None and rule.skip else self.make()

    @abstractmethod
    def make(self) -> Quantizer:
        """The quantizer."""

    def plan(self, model: nn.Module, example: Batch | None = None) -> Plan:
        """The quantizer's own decisions.

        Raises:
            QuantizationError: It decided to do nothing.
        """
        plan = super().plan(model, example)
        if not plan.quantized and not plan.unmatched:
            ops = sorted({entry.op for entry in plan.entries} - {"input", "output"})
            raise QuantizationError(
                f"{self.describe()} annotates nothing here: it has no pattern for {', '.join(ops)}",
                where=f"quantizer {self.config.name}",
                fix="Choose another quantizer, or compose several under pt2e's quantizers",
            )
        return plan


class PresetBackend(_OwnTerms[PresetConfig]):
    """A quantizer of ExecuTorch or torchao under its own defaults."""

    config_class = PresetConfig

    def __init__(self, config: PresetConfig) -> None:
        super().__init__(config)
        self.exports = _EXPORTS.get(config.name.rpartition(":")[2], {})  # type: ignore[misc]

    def strict(self) -> bool | None:
        """Cadence's patterns are written for programs traced from bytecode."""
        cadence = self.config.name.endswith("cadence")
        return True if self.config.strict is None and cadence else self.config.strict

    def make(self) -> Quantizer:
        """The quantizer with the configured arguments.

        Raises:
            QuantizationError: It does not take them.
        """
        name = self.config.name.rpartition(":")[2]
        return _called(
            lambda: _PRESETS[name](self.config.arguments, self.config.config_arguments),
            f"quantizer {name}",
        )


class FactoryBackend(_OwnTerms[FactoryConfig]):
    """Any torchao Quantizer; annotate and validate are all it needs."""

    config_class = FactoryConfig

    def make(self) -> Quantizer:
        """The quantizer, or several in order.

        Raises:
            QuantizationError: A class or function is missing or refuses its arguments.
        """
        made = [_of_part(part) for part in self.config.parts()]
        return made[0] if len(made) == 1 else InOrder(made)

    def asks_for_training(self) -> bool:
        """Whether some part's arguments hold ``is_qat``."""
        return any(part.config_arguments.get("is_qat") for part in self.config.parts())

    def describe(self) -> str:
        """The classes, without their modules."""
        names = [part.quantizer_class.rpartition(":")[2] for part in self.config.parts()]
        return ", then ".join(names)


def _of_part(part: Part) -> Quantizer:
    cls = _imported(part.quantizer_class, "quantizer_class")
    if not isinstance(cls, type) or not issubclass(cls, Quantizer):
        raise QuantizationError(
            f"{part.quantizer_class!r} is no torchao Quantizer",
            where="quantizer.quantizer_class",
            fix="Name a class derived from torchao.quantization.pt2e.quantizer.Quantizer",
        )
    quantizer: Any = _called(lambda: cls(**part.arguments), part.quantizer_class)
    if part.config_factory is None:
        return quantizer
    factory = _imported(part.config_factory, "config_factory")
    config = _called(lambda: factory(**part.config_arguments), part.config_factory)
    method = getattr(quantizer, part.config_method, None)
    if not callable(method):
        raise QuantizationError(
            f"{cls.__name__} has no method {part.config_method!r}",
            where="quantizer.config_method",
            fix=did_you_mean(part.config_method, dir(quantizer)) or None,
        )
    _called(lambda: method(config), f"{cls.__name__}.{part.config_method}")
    return quantizer


def _imported(place: str, field: str) -> Any:
    module, _, name = place.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"cannot import {module!r}",
            where=f"quantizer.{field}",
            cause=str(error),
            fix="Install the package that brings it, or correct the name",
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise QuantizationError(
                f"{module} has no {name!r}",
                where=f"quantizer.{field}",
                fix=did_you_mean(part, dir(found)) or None,
            )
        found = getattr(found, part)
    return found


def _called(make: Callable[[], Any], what: str) -> Any:
    """What ``make`` returns; wrong arguments and missing tools become one line."""
    try:
        return make()
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} needs a package that is not installed",
            where="quantizer",
            cause=str(error),
            fix="pip install what the message names; vendors' SDKs come from the vendor",
        ) from error
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
        raise QuantizationError(
            f"{what} refuses its arguments",
            where="quantizer",
            cause=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix="Correct quantizer.arguments or quantizer.config_arguments",
        ) from error


Arguments = dict[str, Any]


def _cortex_m(arguments: Arguments, config: Arguments) -> Any:
    from executorch.backends.cortex_m.quantizer.quantizer import CortexMQuantizer

    return CortexMQuantizer(**arguments, **config)


def _coreml(arguments: Arguments, config: Arguments) -> Any:
    from coremltools.optimize.torch.quantization import LinearQuantizerConfig
    from executorch.backends.apple.coreml.quantizer import CoreMLQuantizer

    common = {"quantization_scheme": "symmetric", **config}
    return CoreMLQuantizer(LinearQuantizerConfig.from_dict({"global_config": common}), **arguments)


def _qnn(arguments: Arguments, config: Arguments) -> Any:
    from executorch.backends.qualcomm.quantizer.quantizer import QnnQuantizer, QuantDtype

    with _no_download():
        quantizer = QnnQuantizer(**arguments)
    settings = {"quant_dtype": "use_8a8w", **config}
    settings["quant_dtype"] = QuantDtype[settings["quant_dtype"]]
    quantizer.set_default_quant_config(**settings)
    return quantizer


@contextmanager
def _no_download() -> Iterator[None]:
    """Keep Qualcomm's package from fetching its SDK, which annotating a graph does not need.

    It asks this variable whether somebody else has taken care of that.
    """
    if "QNN_SDK_ROOT" in os.environ:
        yield
        return
    os.environ["QNN_SDK_ROOT"] = ""
    try:
        yield
    finally:
        del os.environ["QNN_SDK_ROOT"]


def _vulkan(arguments: Arguments, config: Arguments) -> Any:
    from executorch.backends.vulkan.quantizer.vulkan_quantizer import (
        VulkanQuantizer,
        get_symmetric_quantization_config,
    )

    return VulkanQuantizer(**arguments).set_global(get_symmetric_quantization_config(**config))


def _cadence(arguments: Arguments, config: Arguments) -> Any:
    from executorch.backends.cadence.aot.quantizer.quantizer import CadenceDefaultQuantizer

    return CadenceDefaultQuantizer(**arguments, **config)


def _embedding(arguments: Arguments, config: Arguments) -> Any:
    from torchao.quantization.pt2e.quantizer.embedding_quantizer import EmbeddingQuantizer

    return EmbeddingQuantizer(**arguments, **config)


_PRESETS: dict[str, Callable[[Arguments, Arguments], Any]] = {
    "cortex-m": _cortex_m,
    "coreml": _coreml,
    "qnn": _qnn,
    "vulkan": _vulkan,
    "cadence": _cadence,
    "embedding": _embedding,
}

_EXPORTS: dict[str, dict[str, Export]] = {
    "cortex-m": {"cortex-m": lazily("quark_pt2e.lowering.cortex_m:export")},
    "vulkan": {"vulkan": lazily("quark_pt2e.lowering.vulkan:export")},
}
"""Presets that ExecuTorch lowers without a vendor's tools."""
