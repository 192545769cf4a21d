"""What the host's ``quantize()`` adds to a backend's own direct calls, on the demo network.

Both do the same work on the same data, interleaved in one process on one thread; the ratio is the
median of those of neighbouring calls.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quark_core.batch import as_batch
from quark_core.recipe.load import load_recipe
from quark_core.registry import registry

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "fashion_mnist"


def direct(quantizer: Any, model: torch.nn.Module, batches: list[Any]) -> Any:
    """The backend's own steps and nothing else; it too must not change the caller's model."""
    with torch.no_grad():
        plan = quantizer.plan(model, as_batch(batches[0]))
        prepared = quantizer.prepare(copy.deepcopy(model), plan, as_batch(batches[0]))
        for _ in quantizer.passes(prepared, plan):
            for batch in batches:
                quantizer.calibrate(prepared, as_batch(batch))
        return quantizer.convert(prepared)


def seconds(work: Callable[..., Any], *arguments: Any) -> float:
    """Processor time of one call; on one thread it is not stretched by what else runs."""
    started = time.process_time()
    work(*arguments)
    return time.process_time() - started


def measure(name: str, repeats: int) -> str:
    """One line for one recipe."""
    loaded = load_recipe(EXAMPLES / f"{name}.yaml")
    model, data = loaded.load_model(), loaded.load_data("calibration")
    batches = list(data or ())
    quantizer = registry().quantizer_class(loaded.config.name)(loaded.config)
    quantizer.quantize(model, batches)  # imports and caches are not what is measured
    own: list[float] = []
    host: list[float] = []
    calls = [(own, direct, quantizer, model, batches), (host, quantizer.quantize, model, batches)]
    for _ in range(repeats):
        calls.reverse()  # neither always comes first
        for times, work, *arguments in calls:
            gc.collect()  # what one leaves behind is not the other's to clear away
            times.append(seconds(work, *arguments))
    pairs = [there / here for here, there in zip(own, host, strict=True)]
    return (
        f"{name:<14} direct {statistics.median(own):.3f} s  host {statistics.median(host):.3f} s"
        f"  ratio {statistics.median(pairs):.3f} (of the best runs {min(host) / min(own):.3f})"
    )


def main() -> None:
    """Measure each backend and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=31)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("native-int8", "brevitas-int8"):
        print(measure(name, args.repeats))


if __name__ == "__main__":
    main()
