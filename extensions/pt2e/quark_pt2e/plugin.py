"""The entry point: light facts about quark-pt2e, without torch, torchao or ExecuTorch."""

from __future__ import annotations

from quark_core.registry.hookspecs import hookimpl
from quark_core.registry.specs import Capabilities, QuantizerSpec

_TORCHAO = ("torch>=2.6", "torchao>=0.18,<0.19")
_EXECUTORCH = (*_TORCHAO, "executorch>=1.5,<1.6")
_ARM = (*_EXECUTORCH, "tosa-tools>=2026.5")
_TESTED = ("torch==2.13.0", "torchao==0.18.0")
_TESTED_EXECUTORCH = (*_TESTED, "executorch==1.5.1")
_TESTED_ARM = (*_TESTED_EXECUTORCH, "tosa-tools==2026.5.0", "ethos-u-vela==5.1.0")


def _arm(name: str, stem: str, summary: str, *exports: str) -> QuantizerSpec:
    return QuantizerSpec(
        name=name,
        config=f"quark_pt2e.config.arm:{stem}Config",
        quantizer=f"quark_pt2e.backends.arm:{stem}Backend",
        summary=summary,
        capabilities=Capabilities(exports=(*exports, "pt2"), save_load=True, qat=True),
        requires=_ARM,
        tested=_TESTED_ARM,
    )


def _desktop(
    name: str, stem: str, summary: str, requires: tuple[str, ...], *exports: str
) -> QuantizerSpec:
    return QuantizerSpec(
        name=name,
        config=f"quark_pt2e.config.desktop:{stem}Config",
        quantizer=f"quark_pt2e.backends.desktop:{stem}Backend",
        summary=summary,
        capabilities=Capabilities(exports=(*exports, "pt2"), save_load=True, qat=True),
        requires=requires,
        tested=_TESTED_EXECUTORCH if requires is _EXECUTORCH else _TESTED,
    )


def _preset(name: str, summary: str, requires: tuple[str, ...]) -> QuantizerSpec:
    return QuantizerSpec(
        name=name,
        config="quark_pt2e.config.factory:PresetConfig",
        quantizer="quark_pt2e.backends.factory:PresetBackend",
        summary=summary,
        capabilities=Capabilities(exports=("pt2",), save_load=True),
        requires=requires,
        tested=_TESTED if requires is _TORCHAO else _TESTED_EXECUTORCH,
    )


@hookimpl
def quark_quantizers() -> list[QuantizerSpec]:
    """The PT2E quantizers by name."""
    return [
        _arm("ethos-u", "EthosU", "Arm Ethos-U NPUs: 8x8, 16x8, 8x4, to Vela", "ethos-u", "tosa"),
        _arm("tosa", "Tosa", "TOSA's integer profile, run on its reference model", "tosa"),
        _arm("vgf", "Vgf", "Vulkan devices through Arm's VGF", "vgf", "tosa"),
        _desktop(
            "xnnpack",
            "Xnnpack",
            "ExecuTorch on CPUs: int8, static or dynamic",
            _EXECUTORCH,
            "xnnpack",
        ),
        _desktop("x86-inductor", "X86Inductor", "torch.compile on x86 CPUs", _TORCHAO, "inductor"),
        _desktop("arm-inductor", "ArmInductor", "torch.compile on Arm CPUs", _TORCHAO),
        _preset("cortex-m", "Arm Cortex-M through CMSIS-NN", _ARM),
        _preset("coreml", "Apple devices through Core ML", (*_EXECUTORCH, "coremltools>=8")),
        _preset("qnn", "Qualcomm NPUs", _EXECUTORCH),
        _preset("vulkan", "GPUs through Vulkan: linear layers", _EXECUTORCH),
        _preset("cadence", "Cadence DSPs", _EXECUTORCH),
        _preset("embedding", "embedding tables alone, to 8 bits", _TORCHAO),
        QuantizerSpec(
            name="pt2e",
            config="quark_pt2e.config.factory:FactoryConfig",
            quantizer="quark_pt2e.backends.factory:FactoryBackend",
            summary="any PT2E quantizer by its import path, or several in order",
            capabilities=Capabilities(exports=("pt2",), save_load=True, qat=True),
            requires=_TORCHAO,
            tested=_TESTED,
            runs_code=True,
        ),
    ]
