"""Copies what the golden tests read out of the full set of reference results.

Run: python make_golden.py FOLDER, where FOLDER holds cnn.safetensors, inputs.npz and results.npz
of direct Brevitas 0.13.4 runs on a fixed network.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np

CONFIGS = (
    "lw_w8a8_pc",
    "lw_w8a8_nobc",
    "fx_w8a8_pc",
    "fx_w8a8_po2",
    "lw_w4a8_gptq",
    "lw_w8a8_dyn",
    "lw_w8_only",
    "lw_mxfp8",
    "lw_noeq_w8a8_asym",
)
HERE = Path(__file__).parent / "golden"


def main() -> None:
    """Read the full set, write the compact copy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    source = parser.parse_args().folder
    HERE.mkdir(exist_ok=True)
    shutil.copyfile(source / "cnn.safetensors", HERE / "cnn.safetensors")
    inputs = np.load(source / "inputs.npz")
    np.savez_compressed(HERE / "inputs.npz", calib=inputs["calib"], eval=inputs["eval"])
    results = np.load(source / "results.npz")
    kept = {"float_logits": results["float_logits"]}
    for name in results.files:
        config, _, rest = name.partition("/")
        numbers = rest.endswith(("scale", "zero_point", "bias_float"))
        integers = config in ("lw_w8_only", "lw_w4a8_gptq") and rest.endswith("int")
        if config in CONFIGS and (rest == "logits" or numbers or integers):
            kept[name] = results[name]
    np.savez_compressed(HERE / "results.npz", **kept)


if __name__ == "__main__":
    main()
