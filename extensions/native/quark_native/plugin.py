"""The entry point: light facts about quark-native, without torch."""

from __future__ import annotations

from quark_core.registry.hookspecs import hookimpl
from quark_core.registry.specs import Capabilities, Diagnostic, QuantizerSpec


@hookimpl
def quark_quantizers() -> list[QuantizerSpec]:
    """The backend ``native``."""
    return [
        QuantizerSpec(
            name="native",
            config="quark_native.config:NativeConfig",
            quantizer="quark_native.quantizer:NativeQuantizer",
            summary="exact int, fp8, fp6, fp4, MX and BFP formats in plain torch",
            capabilities=Capabilities(save_load=True, set_enabled=True, submodule=True),
            requires=("torch>=2.6",),
            tested=("torch==2.13.0",),
        )
    ]


@hookimpl
def quark_diagnostics() -> list[Diagnostic]:
    """Which kernels compute the formats on this machine."""
    import torch

    threads = torch.get_num_threads()
    where = f"plain torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    found = [Diagnostic("kernels on cpu", f"{where}, {threads} threads")]
    if torch.cuda.is_available():
        found.append(Diagnostic("kernels on cuda", f"plain torch, {torch.cuda.get_device_name(0)}"))
    return found
