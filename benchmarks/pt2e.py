"""EthosUQuantizer through the host against calling it directly, and batched calibration.

Run: python benchmarks/pt2e.py. Prints the shortest of several runs of each.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable

import torch
from torch import nn

SAMPLES = 128
ROUNDS = 7


class Network(nn.Module):
    """A stem and four blocks of depthwise and pointwise convolutions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, groups=width),
                nn.BatchNorm2d(width),
                nn.ReLU6(),
                nn.Conv2d(width, width, 1),
            )
            for _ in range(4)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps [N, 3, H, W] to [N, 10]."""
        x = self.stem(images)
        for block in self.blocks:
            x = x + block(x)
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def direct(model: nn.Module, batches: list[torch.Tensor]) -> nn.Module:
    """As ExecuTorch's documentation does it."""
    from executorch.backends.arm.ethosu import EthosUCompileSpec
    from executorch.backends.arm.quantizer import (
        EthosUQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = EthosUQuantizer(EthosUCompileSpec("ethos-u55-128"))
    quantizer.set_global(get_symmetric_quantization_config())
    with torch.no_grad():
        program = torch.export.export(copy.deepcopy(model), (batches[0][:1],), strict=False)
        prepared = prepare_pt2e(program.module(check_guards=False), quantizer)
        for batch in batches:
            prepared(batch)
        converted: nn.Module = convert_pt2e(prepared)
    return converted


def hosted(model: nn.Module, batches: list[torch.Tensor], batch: str = "static") -> nn.Module:
    """The same through the host; ``batch: dynamic`` exports for any number of samples."""
    from quark_pt2e.backends.arm import EthosUBackend
    from quark_pt2e.config.arm import EthosUConfig

    config = EthosUConfig(name="ethos-u", weight="int8", input="int8/mse", batch=batch)
    return EthosUBackend(config).quantize(model, batches).module


def shortest(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Processor seconds of the fastest of several rounds; rounds are interleaved."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    model = Network().eval()
    images = torch.randn(SAMPLES, 3, 32, 32)
    singles, whole = list(images[:, None]), [images]
    ours, theirs = hosted(model, singles), direct(model, singles)
    with torch.no_grad():
        expected = torch.cat([theirs(image) for image in singles])
        found = torch.cat([ours(image) for image in singles])
        print(f"equal outputs: {torch.equal(found, expected)}")
    runs = {
        "direct, one by one": lambda: direct(model, singles),
        "host, one by one": lambda: hosted(model, singles),
        "host, one batch": lambda: hosted(model, whole, "dynamic"),
    }
    for name, seconds in (times := shortest(runs)).items():
        print(f"{name:20} {seconds:6.2f} s")
    added = times["host, one by one"] / times["direct, one by one"] - 1
    print(f"the host adds {added:+.1%}")
    calibration(model, singles, whole)


def calibration(model: nn.Module, singles: list[torch.Tensor], whole: list[torch.Tensor]) -> None:
    """Calibration alone, sample by sample and as one batch."""
    from quark_pt2e.backends.arm import EthosUBackend
    from quark_pt2e.config.arm import EthosUConfig

    from quark_core.batch import as_batch

    config = EthosUConfig(name="ethos-u", weight="int8", input="int8/mse")
    backend = EthosUBackend(config)
    best = {}
    for name, batches in (("one by one", singles), ("one batch", whole)):
        best[name] = float("inf")
        for _ in range(3):
            plan = backend.plan(model, as_batch(whole[0]))
            prepared = backend.prepare(copy.deepcopy(model), plan)
            start = time.process_time()
            for batch in batches:
                backend.calibrate(prepared, as_batch(batch))
            best[name] = min(best[name], time.process_time() - start)
        print(f"calibration {name:12} {best[name]:6.3f} s")
    print(f"batched calibration is {best['one by one'] / best['one batch']:.1f} times as fast")


if __name__ == "__main__":
    main()
