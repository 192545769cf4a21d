"""quark_core: the host where every PyTorch quantizer lives behind one interface.

Names are loaded on first use, so that importing the package costs next to nothing and needs
neither torch nor any backend.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quark_core.api import get_quantizer, list_quantizers, quantize, run
    from quark_core.batch import Batch
    from quark_core.config import Calibration, QuantizationConfig
    from quark_core.errors import QuarkError
    from quark_core.partial import Partial
    from quark_core.plan import Plan, PlanEntry, Step
    from quark_core.quantized import Encoding, QuantizedModel
    from quark_core.quantizer import ModelQuantizer
    from quark_core.registry import Registry
    from quark_core.registry.hookspecs import hookimpl
    from quark_core.registry.specs import (
        API_VERSION,
        Capabilities,
        Diagnostic,
        ExporterSpec,
        MetricSpec,
        QuantizerSpec,
        SourceSpec,
    )
    from quark_core.spec import Granularity, LayerRule, Observer, Selector, TensorSpec
    from quark_core.support import Support, integers

__version__ = "0.1.0"

_HOMES = {
    "api": ("get_quantizer", "list_quantizers", "quantize", "run"),
    "batch": ("Batch",),
    "config": ("Calibration", "QuantizationConfig"),
    "errors": ("QuarkError",),
    "partial": ("Partial",),
    "plan": ("Plan", "PlanEntry", "Step"),
    "quantized": ("Encoding", "QuantizedModel"),
    "quantizer": ("ModelQuantizer",),
    "registry": ("Registry",),
    "registry.hookspecs": ("hookimpl",),
    "registry.specs": (
        "API_VERSION",
        "Capabilities",
        "Diagnostic",
        "ExporterSpec",
        "MetricSpec",
        "QuantizerSpec",
        "SourceSpec",
    ),
    "spec": ("Granularity", "LayerRule", "Observer", "Selector", "TensorSpec"),
    "support": ("Support", "integers"),
}
_MODULES = ("errors", "formats", "registry")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "API_VERSION",
    "Batch",
    "Calibration",
    "Capabilities",
    "Diagnostic",
    "Encoding",
    "ExporterSpec",
    "Granularity",
    "LayerRule",
    "MetricSpec",
    "ModelQuantizer",
    "Observer",
    "Partial",
    "Plan",
    "PlanEntry",
    "QuantizationConfig",
    "QuantizedModel",
    "QuantizerSpec",
    "QuarkError",
    "Registry",
    "Selector",
    "SourceSpec",
    "Step",
    "Support",
    "TensorSpec",
    "__version__",
    "get_quantizer",
    "hookimpl",
    "integers",
    "list_quantizers",
    "quantize",
    "run",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF, *_MODULES})
