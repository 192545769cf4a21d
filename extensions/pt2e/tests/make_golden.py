"""Copies what the golden tests read out of the full set of reference results.

Run: python make_golden.py FOLDER, where FOLDER holds the results of calling ExecuTorch 1.5.1's
EthosUQuantizer itself on two fixed networks.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent / "golden"
ROW = ("node", "scale", "zero_point", "qmin", "qmax", "dtype")


def main() -> None:
    """Read the full set, write the compact copy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    source = parser.parse_args().folder
    HERE.mkdir(exist_ok=True)
    for name in ("cnn", "cond"):
        shutil.copyfile(source / f"{name}.safetensors", HERE / f"{name}.safetensors")
    inputs = {**np.load(source / "cnn_inputs.npz"), **np.load(source / "cond_inputs.npz")}
    np.savez_compressed(HERE / "inputs.npz", **inputs)
    np.savez_compressed(HERE / "outputs.npz", **np.load(source / "outputs.npz"))
    tables, weights = {}, {}
    for file in sorted(source.glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        if "qparams" in data:
            tables[file.stem] = _table(data)
    for file in sorted(source.glob("*_qweights.npz")):
        name = file.stem.removesuffix("_qweights")
        weights |= {f"{name}/{key}": value for key, value in np.load(file).items()}
    np.savez_compressed(HERE / "weights.npz", **weights)
    text = json.dumps(tables, separators=(",", ":"))
    (HERE / "tables.json").write_text(text + "\n", encoding="utf-8")


def _table(data: dict[str, Any]) -> list[list[Any]]:
    parts = [data, *data.get("submodules", {}).values()]
    return [[row[key] for key in ROW] for part in parts for row in part["qparams"]]


if __name__ == "__main__":
    main()
