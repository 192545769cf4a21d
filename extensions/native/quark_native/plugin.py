"""The entry point: light facts about quark-native, without torch."""

from __future__ import annotations

from quark_core.registry.hookspecs import hookimpl
from quark_core.registry.specs import (
    Capabilities,
    Diagnostic,
    FormatExplanation,
    QuantizerSpec,
)


@hookimpl
def quark_quantizers() -> list[QuantizerSpec]:
    """The backend ``native``."""
    return [
        QuantizerSpec(
            name="native",
            config="quark_native.config:NativeConfig",
            quantizer="quark_native.quantizer:NativeQuantizer",
            summary="every number format, exact: int, fp8..fp4, MX, NVFP4, BFP, log; own kernels",
            capabilities=Capabilities(save_load=True, set_enabled=True, submodule=True),
            requires=("torch>=2.6",),
            tested=("torch==2.13.0",),
        )
    ]


@hookimpl
def quark_explain_format(spec: str, values: list[float], profile: str) -> FormatExplanation:
    """What a format makes of some values."""
    from quark_native.explain import explain

    return explain(spec, values, profile)


@hookimpl
def quark_diagnostics() -> list[Diagnostic]:
    """Which kernels compute the formats on this machine, and why."""
    from quark_native.kernels.diagnostics import diagnostics

    return diagnostics()
