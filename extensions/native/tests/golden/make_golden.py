"""Copies what the tests need out of a full set of golden vectors: make_golden.py FOLDER.

FOLDER holds formats/, aimet/ and mase/ as their READMEs describe them: outputs of microxcaling,
torchao, dmx-compressor, ml_dtypes and AIMET, and of exact computations, data only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
DMX = ("BFP[2|8]{32}(SN)", "BFP[4|8]{16}(SN)", "BFP[8|8]{64}(SN)", "BFP[16|8]{64}(SN)")
DMX_ELEMENT = "BFP[24|8]{1}(SN)"
CASTS = (
    "float6_e3m2fn",
    "float6_e2m3fn",
    "float4_e2m1fn",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3",
    "float8_e3m4",
    "bfloat16",
)
AIMET = (
    "tensor-w2-asym",
    "tensor-w4-sym",
    "tensor-w8-sym",
    "tensor-w16-asym",
    "channel0-w8-asym",
    "channel1-w4-sym",
    "channel1-w16-sym",
    "conv_channel-w8-sym",
    "block-w4-sym",
    "block-w8-asym",
    "grad-w4-sym",
    "grad-w4-asym",
)
FIELDS = ("x", "scale", "offset", "q", "min", "max", "qdq", "g", "grad_x")


def formats(folder: Path) -> dict[str, np.ndarray]:
    """Inputs and outputs of the block formats, keyed ``source|...|input``.

    ``mx`` are the values that microxcaling and torchao agree on, stored once.
    """
    inputs = np.load(folder / "inputs.npz")
    found = {f"input|{name}": inputs[name] for name in inputs}
    for key, values in np.load(folder / "microxcaling_cpp.npz").items():
        name, rounding, block, axis, x = key.split("|")
        if (rounding, block, axis) == ("even", "32", "-1"):
            found[f"mx|mx{name}|{x}"] = values
    for key, values in np.load(folder / "torchao_mx_main.npz").items():
        name, mode, _, x, part = key.split("|")
        if mode == "floor" and part == "dq":
            np.testing.assert_array_equal(values, found[f"mx|mx{name}|{x}"])
        elif mode == "floor":
            found[f"torchao|mx{name}|{x}|{part}"] = values
    for key, values in np.load(folder / "dmx_compressor.npz").items():
        shorthand, axis, x = key.rsplit("|", 2)
        if shorthand in DMX or (shorthand == DMX_ELEMENT and x in ("normal", "pow2_edge")):
            found[f"dmx|{shorthand}|{axis}|{x}"] = values
    return found


def casts(folder: Path) -> dict[str, np.ndarray]:
    """The element-by-element casts of ml_dtypes."""
    everything = np.load(folder / "elementwise_casts.npz")
    found = {"input": everything["input"]}
    for name in CASTS:
        found[name] = everything[f"{name}|bits"]
    return found


def affine(folder: Path) -> dict[str, np.ndarray]:
    """AIMET's min-max calibrated integers, and its straight-through gradient."""
    found = {}
    for key, values in np.load(folder / "affine.npz").items():
        case, _, field = key.rpartition("/")
        if case in AIMET and field in FIELDS:
            small = field == "q" and np.abs(values).max() < 128
            found[key] = values.astype(np.int8) if small else values
    return found


def ideal(folder: Path) -> dict[str, np.ndarray]:
    """Float64 computations of minifloats and their blocks, keyed ``NAME|input``, and inputs."""
    quantizers = np.load(folder / "quantizers.npz")
    manifest = json.loads((folder / "quantizers_manifest.json").read_text(encoding="utf-8"))
    rows = {row["key"]: row for row in manifest}
    found = {}
    for key, values in np.load(folder / "ideal.npz").items():
        row = rows[key.removeprefix("ideal/")]
        x = row["input"]
        found[f"input|{x}"] = quantizers[f"in/{x}"]
        found[f"{_name(row['fn'], row['cfg'])}|{x}"] = values
    return found


def _name(function: str, cfg: dict[str, int]) -> str:
    if function == "minifloat_ieee":
        bias = "" if cfg["exponent_bias"] is None else f",{cfg['exponent_bias']}"
        mantissa = cfg["width"] - 1 - cfg["exponent_width"]
        return f"fp[1|{cfg['exponent_width']}|{mantissa}{bias}]/unit"
    if function == "minifloat_mx":
        return f"fp[1|{cfg['exp_bits']}|{cfg['frac_bits']}]/unit"
    if function == "mxfp":
        exponent, mantissa = cfg["element_exp_bits"], cfg["element_frac_bits"]
        return f"block_minifloat[{1 + exponent + mantissa}|{exponent}|8]{{{cfg['block_size']}}}"
    sizes = (cfg["width"], cfg["exponent_width"], cfg["exponent_bias_width"])
    return f"block_minifloat[{'|'.join(map(str, sizes))}]{{{cfg['block_size'][-1]}}}"


def main() -> None:
    """Write the files beside this script."""
    folder = Path(sys.argv[1])
    np.savez_compressed(HERE / "formats.npz", **formats(folder / "formats"))
    np.savez_compressed(HERE / "casts.npz", **casts(folder / "formats"))
    np.savez_compressed(HERE / "affine.npz", **affine(folder / "aimet"))
    np.savez_compressed(HERE / "ideal.npz", **ideal(folder / "mase"))


if __name__ == "__main__":
    main()
