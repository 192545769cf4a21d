"""SmolLM2-135M under Brevitas's algorithms: perplexity, KL, top-1 agreement, time, memory.

    python benchmarks/brevitas_smollm2.py [--only gptq] [--windows 8]

Each row runs in a process of its own, so that its peak of memory is its own. The output layer and
the embedding stay float.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
W4 = "int4/group:64/asym"
W8A8 = {"weight": "int8", "input": "int8/token/dynamic/sym"}
W4A8 = {**W8A8, "weight": "int4"}
W8A4 = {"weight": "int8", "input": "int4/token/dynamic/sym"}
ROTATED: dict[str, Any] = {"merge_layernorm": True, "rotation": {"mode": "fused"}}
ROWS: dict[str, dict[str, Any]] = {
    "native nearest": {"name": "native", "weight": W4},
    "nearest": {"weight": W4},
    "mse": {"weight": f"{W4}/mse"},
    "hqo": {"weight": W4, "hqo": True, "round_zero_points": False},
    "gptq": {"weight": W4, "algorithm": "gptq"},
    "gptq act order": {"weight": W4, "algorithm": {"name": "gptq", "act_order": True}},
    "gpfq": {"weight": W4, "algorithm": "gpfq"},
    "qronos": {"weight": W4, "algorithm": "qronos"},
    "learned round, by blocks": {
        "weight": W4,
        "algorithm": {
            "name": "learned_round",
            "blocks": "model.layers",
            "iterations": 100,
            "learning_rate": 0.01,
        },
    },
    "magr + gptq": {"weight": W4, "magr": {"alpha": 0.001, "steps": 50}, "algorithm": "gptq"},
    "awq": {"weight": W4, "awq": {}},
    "awq, fused": {"weight": W4, "awq": {"mode": "fused"}},
    "svdquant, rank 32": {"weight": W4, "low_rank": {"rank": 32}},
    "w8a8": W8A8,
    "w8a8 smoothquant 0.5": {**W8A8, "activation_equalization": {"alpha": 0.5}},
    "w8a8 smoothquant 0.5, fused": {
        **W8A8,
        "activation_equalization": {"mode": "fused", "alpha": 0.5},
    },
    "w4a8": W4A8,
    "w4a8, gptq": {**W4A8, "algorithm": "gptq"},
    "w4a8 rotated": {**W4A8, **ROTATED},
    "w4a8 rotated, gptq": {**W4A8, **ROTATED, "algorithm": "gptq"},
    "w8a4": W8A4,
    "w8a4 rotated": {**W8A4, **ROTATED},
    "w8a4 rotated, online": {**W8A4, **ROTATED, "rotation": {"online": True}},
}


def run(row: str, windows: int, seq: int, calibration: int) -> dict[str, float]:
    """Quantize and measure one row."""
    import torch
    from quark_brevitas.config import BrevitasConfig
    from quark_brevitas.quantizer import BrevitasQuantizer
    from quark_native.config import NativeConfig
    from quark_native.quantizer import NativeQuantizer

    sys.path.insert(0, str(ROOT))
    from examples.smollm2 import model as smollm2

    torch.set_num_threads(1)
    model = smollm2.load()
    fields = {
        "name": "brevitas",
        "rules": [{"glob": name, "skip": True} for name in ("*lm_head",)],
        **ROWS[row],
    }
    quantizer: Any
    if fields["name"] == "native":
        fields["rules"].append({"glob": "*embed_tokens", "skip": True})
        quantizer = NativeQuantizer(NativeConfig(**fields))
    else:
        quantizer = BrevitasQuantizer(BrevitasConfig(**fields))
    data = smollm2.calibration(windows=calibration, seq=seq)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, worked = time.perf_counter(), time.process_time()
    quantized = quantizer.quantize(model, data)
    found = {"wall s": time.perf_counter() - began, "cpu s": time.process_time() - worked}
    found["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found["peak before MB"] = before / 1024
    loss = divergence = agreed = 0.0
    count = 0
    with torch.no_grad():
        for inputs, following in smollm2.evaluation(windows=windows, seq=seq):
            kept = following != -100
            truth = model(**inputs).logits[kept].log_softmax(-1)
            logits = quantized(**inputs).logits[kept].log_softmax(-1)
            loss -= float(logits.gather(1, following[kept][:, None]).sum())
            divergence += float((truth.exp() * (truth - logits)).sum())
            agreed += float((truth.argmax(-1) == logits.argmax(-1)).sum())
            count += int(kept.sum())
    found["perplexity"] = math.exp(loss / count)
    found["KL"], found["top-1"] = divergence / count, agreed / count
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", action="append", choices=list(ROWS))
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--calibration", type=int, default=16)
    parser.add_argument("--row", choices=list(ROWS))
    arguments = parser.parse_args()
    if arguments.row:
        found = run(arguments.row, arguments.windows, arguments.seq, arguments.calibration)
        print(json.dumps(found))
        return
    print("| method | perplexity | KL | top-1 | wall s | CPU s | peak MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for row in arguments.only or ROWS:
        command = [sys.executable, __file__, "--row", row, "--windows", str(arguments.windows)]
        command += ["--seq", str(arguments.seq), "--calibration", str(arguments.calibration)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        print(
            f"| {row} | {found['perplexity']:.2f} | {found['KL']:.4f} | {found['top-1']:.3f} | "
            f"{found['wall s']:.0f} | {found['cpu s']:.0f} | {found['peak MB']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
