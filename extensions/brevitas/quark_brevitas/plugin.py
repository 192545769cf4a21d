"""The entry point: light facts about quark-brevitas, without torch and without Brevitas."""

from __future__ import annotations

from quark_core.registry.hookspecs import hookimpl
from quark_core.registry.specs import Capabilities, QuantizerSpec

_ONNX = ("onnx>=1.17", "onnxoptimizer>=0.3.13")


@hookimpl
def quark_quantizers() -> list[QuantizerSpec]:
    """The backend ``brevitas``."""
    return [
        QuantizerSpec(
            name="brevitas",
            config="quark_brevitas.config:BrevitasConfig",
            quantizer="quark_brevitas.quantizer:BrevitasQuantizer",
            summary="Brevitas: integers, minifloats, MX; GPTQ, GPFQ, Qronos, learned rounding",
            capabilities=Capabilities(
                exports=("onnx_qcdq", "qonnx", "torch_qcdq", "pt2", "gguf"),
                save_load=True,
                set_enabled=True,
                qat=True,
                export_requires={
                    "onnx_qcdq": (*_ONNX, "onnxruntime>=1.20"),
                    "qonnx": _ONNX,
                    "gguf": ("gguf>=0.10",),
                },
            ),
            requires=("brevitas>=0.13,<0.14", "torch>=2.6"),
            tested=("brevitas==0.13.4", "torch==2.13.0"),
        )
    ]
