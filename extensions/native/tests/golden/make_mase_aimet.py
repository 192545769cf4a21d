"""Copies what the profile tests need out of a full set of golden vectors: make_mase_aimet.py FOLDER.

FOLDER holds mase/ and aimet/ as their READMEs describe them. Written here: the inputs, and in
mase_aimet.json every configuration with a digest of each output.
"""

from __future__ import annotations

import json
import sys
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
NOTES = ("note", "calib", "out_dtype", "maxval")
"""Remarks among a configuration's arguments."""
AIMET_FILES = ("affine", "lpbq", "float")


def digest(values: np.ndarray) -> str:
    """Eight bytes that stand for float32 values: -0 is +0, and all NaNs are one."""
    plain = values.astype("<f4") + np.float32(0.0)
    bits = np.where(np.isnan(plain), np.uint32(0x7FC00000), plain.view("<u4"))
    return blake2b(bits.astype("<u4").tobytes(), digest_size=8).hexdigest()


def differences(found: np.ndarray, expected: np.ndarray, x: np.ndarray, most: int = 5) -> str:
    """The first positions that differ, a line each: index, input, found, expected."""
    if found.shape != expected.shape:
        return f"shape {found.shape}, not {expected.shape}"
    wrong = ~((found == expected) | (np.isnan(found) & np.isnan(expected)))
    x = np.broadcast_to(x, found.shape)
    lines = [
        f"{index}: x {x[index]!r}, found {found[index]!r}, expected {expected[index]!r}"
        for index in map(tuple, np.argwhere(wrong)[:most].tolist())
    ]
    return "\n".join([f"{wrong.sum()} of {wrong.size} differ", *lines])


def mase(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The inputs, and by function and configuration its arguments and its outputs by input."""
    arrays = np.load(folder / "quantizers.npz")
    inputs = {name[3:]: arrays[name] for name in arrays if name.startswith("in/")}
    table: dict[str, Any] = {}
    for row in json.loads((folder / "quantizers_manifest.json").read_text()):
        output = f"out/{row['key']}"
        if output not in arrays:
            continue
        function, name, x = row["key"].split("/")
        arguments = {key: value for key, value in row["cfg"].items() if key not in NOTES}
        entry = table.setdefault(function, {}).setdefault(name, {"arguments": arguments})
        entry.setdefault("outputs", {})[x] = digest(arrays[output])
    return inputs, table


def aimet(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The inputs, each once, and by file and case its arguments, inputs and outputs.

    A range is an input where a gradient with respect to it is an output.
    """
    inputs: dict[str, np.ndarray] = {}
    names: dict[tuple[str, tuple[int, ...]], str] = {}
    table: dict[str, Any] = {}
    for file in AIMET_FILES:
        arrays = np.load(folder / f"{file}.npz")
        for case, row in json.loads((folder / f"{file}.manifest.json").read_text()).items():
            fields = [key[len(case) + 1 :] for key in arrays if key.startswith(f"{case}/")]
            if not fields:
                continue
            given = {"x", "g"} | ({"min", "max"} if "grad_x" in fields else set())
            arguments = {key: value for key, value in row.items() if key not in NOTES}
            entry: dict[str, Any] = {"arguments": arguments, "inputs": {}, "outputs": {}}
            for field in fields:
                values = arrays[f"{case}/{field}"]
                if field not in given:
                    entry["outputs"][field] = digest(values)
                    continue
                name = names.setdefault((digest(values), values.shape), f"input{len(names)}")
                inputs[name] = values
                entry["inputs"][field] = name
            table.setdefault(file, {})[case] = entry
    return inputs, table


def main() -> None:
    """Write the files beside this script."""
    folder = Path(sys.argv[1])
    mase_inputs, mase_table = mase(folder / "mase")
    aimet_inputs, aimet_table = aimet(folder / "aimet")
    np.savez_compressed(HERE / "mase.npz", **mase_inputs)
    np.savez_compressed(HERE / "aimet.npz", **aimet_inputs)
    text = json.dumps({"aimet": aimet_table, "mase": mase_table}, indent=1, sort_keys=True)
    (HERE / "mase_aimet.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
