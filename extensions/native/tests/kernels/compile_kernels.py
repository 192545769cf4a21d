"""Compiles the Triton kernels for GPUs that need not be there; prints what they take, as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from quark_native.formats import Format
from quark_native.kernels import gpu
from quark_native.kernels.library import KINDS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {"float32": "fp32", "bfloat16": "i16", "float16": "fp16"}


def blocks(name: str, dtype: str, across: bool) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """Fake quantization of blocks, as :mod:`quark_native.kernels.gpu` launches it."""
    fmt = Format.parse(name)
    call, size = fmt.call(), fmt.layout.size
    width = 1 << (size - 1).bit_length()
    constants = {
        **_element(call),
        "KIND": KINDS.index(call.kind),
        "LOW": call.low,
        "BLOCK": size,
        "WIDTH": width,
        "EVEN": not across,
        "ACROSS": across,
        "BF16": dtype == "bfloat16",
        "TILE": gpu.tile_of(width),
    }
    pointers = {"x_ptr": TYPES[dtype], "out_ptr": TYPES[dtype], "outer_ptr": "fp32"}
    rest = ("length", "inner", "groups", "rows")
    return gpu.kernels()["blocks"], _signature(pointers, rest, constants), constants


def pack(name: str, dtype: str) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """Packing of MX blocks."""
    fmt = Format.parse(name)
    constants = {
        **_element(fmt.call()),
        "BITS": fmt.number.bits,
        "FIXED": fmt.call().fixed,
        "BLOCK": fmt.layout.size,
        "BF16": dtype == "bfloat16",
        "TILE": gpu.tile_of(fmt.layout.size),
    }
    pointers = {"x_ptr": TYPES[dtype], "codes_ptr": "u8", "scales_ptr": "u8"}
    return gpu.kernels()["pack"], _signature(pointers, ("rows",), constants), constants


def given(name: str, dtype: str) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """Fake quantization with one scale for all."""
    call = Format.parse(name).call()
    constants = {
        **{key: value for key, value in _element(call).items() if "SCALE" not in key},
        "KIND": KINDS.index(call.kind),
        "LOW": call.low,
        "EXTRA": False,
        "WHOLE": True,
        "BF16": dtype == "bfloat16",
        "TILE": gpu.ELEMENTS_A_PROGRAM,
    }
    del constants["BUMP"]
    pointers = {"x_ptr": TYPES[dtype], "out_ptr": TYPES[dtype], "scale_ptr": "fp32"}
    pointers["extra_ptr"] = "fp32"
    rest = ("count", "length", "inner", "block", "scale_rows", "scale_outer")
    rest += ("scale_block", "scale_inner")
    return gpu.kernels()["given"], _signature(pointers, rest, constants), constants


def _element(call: Any) -> dict[str, Any]:
    return {
        "ROUNDING": 0,
        "MANTISSA_BITS": call.mantissa,
        "MIN_EXPONENT": call.min_exponent,
        "MAX_EXPONENT": call.max_exponent,
        "HIGH": call.high,
        "BUMP": call.bump,
        "MIN_SCALE": call.min_scale,
        "MAX_SCALE": call.max_scale,
    }


def _signature(
    pointers: dict[str, str], rest: tuple[str, ...], constants: dict[str, Any]
) -> dict[str, str]:
    signature = {name: f"*{kind}" for name, kind in pointers.items()}
    signature |= {"seed": "i64"} | dict.fromkeys(rest, "i32")
    return signature | dict.fromkeys(constants, "constexpr")


def compiled(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], target: GPUTarget
) -> dict[str, int]:
    """Registers, local memory, and how wide memory is read and written."""
    ordered = {name: signature[name] for name in kernel.arg_names}
    places = {name: place for place, name in enumerate(ordered)}
    # What Triton finds by itself for the usual sizes: multiples of 16.
    sizes = ("inner", "count")
    aligned = [name for name, kind in ordered.items() if kind[0] == "*" or name in sizes]
    source = ASTSource(
        fn=kernel,
        signature=ordered,
        constexprs={(places[name],): value for name, value in constants.items()},
        attrs={(places[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": gpu.WARPS, "enable_fp_fusion": False}
    binary = triton.compile(source, target=target, options=options)
    return _amd(binary.asm["amdgcn"]) if target.backend == "hip" else _nvidia(binary.asm)


def _nvidia(asm: dict[str, Any]) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}
    counts = {
        key: len(re.findall(pattern, asm["ptx"]))
        for key, pattern in {
            "loads": r"ld\.global",
            "wide_loads": r"ld\.global[^;]*v4\.b32",
            "stores": r"st\.global",
            "wide_stores": r"st\.global[^;]*v4\.b32",
        }.items()
    }
    return {"registers": found["REG"], "local": found["STACK"] + found["LOCAL"], **counts}


def _amd(asm: str) -> dict[str, int]:
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", asm)[1]),
        "local": int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", asm)[1]),
        "loads": len(re.findall(r"(?:global|buffer)_load", asm)),
        "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", asm)),
        "stores": len(re.findall(r"(?:global|buffer)_store", asm)),
        "wide_stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", asm)),
    }


def main() -> None:
    """Compile everything for every target."""
    jobs = {
        f"{name} {dtype}{' across' if across else ''}": blocks(name, dtype, across)
        for name in ("mxfp4", "mxfp8", "bfp[8|8]{64}", "nvfp4", "block_log[8|8]{16}")
        for dtype in ("float32", "bfloat16")
        for across in (False, True)
    }
    for name in ("mxfp4", "mxfp6", "mxfp8"):
        jobs |= {f"pack {name} {dtype}": pack(name, dtype) for dtype in ("float32", "bfloat16")}
    for name in ("int8/tensor", "fp8_e4m3/tensor", "log[8]", "ternary/tensor"):
        jobs |= {f"{name} {dtype}": given(name, dtype) for dtype in ("float32", "bfloat16")}
    found = {
        f"{title} {target}": compiled(*job, TARGETS[target])
        for title, job in jobs.items()
        for target in TARGETS
    }
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
