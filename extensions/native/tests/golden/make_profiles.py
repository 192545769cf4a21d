"""Copies what the profile tests need out of the golden vectors of formats: make_profiles.py FOLDER.

FOLDER holds the files that its README describes: inputs and what other libraries return for them,
data only. The inputs are kept; of each output only a digest.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
FILES = (
    "microxcaling_torch",
    "microxcaling_cpp",
    "torchao_mx",
    "torchao_mx_main",
    "torchao_nvfp4",
    "dmx_compressor",
    "dmx_mltools",
    "quark",
    "brevitas",
    "tensorcast",
    "gfloat",
)
NAN = 0x7FC00000


def digest(values: np.ndarray) -> str:
    """blake2b of the bytes, eight of them; of floats without the sign of zero, one NaN for all."""
    if values.dtype == np.float32:
        bits = (values + np.float32(0)).view("<u4")
        values = np.where(np.isnan(values), np.uint32(NAN), bits)
    return hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()


def main() -> None:
    """Write the two files beside this script."""
    folder = Path(sys.argv[1])
    np.savez_compressed(HERE / "profiles_formats.npz", **np.load(folder / "inputs.npz"))
    digests = {}
    for name in FILES:
        outputs = np.load(folder / f"{name}.npz")
        digests[name] = {key: digest(outputs[key]) for key in sorted(outputs)}
    text = json.dumps(digests, indent=0)
    (HERE / "profiles_formats.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
