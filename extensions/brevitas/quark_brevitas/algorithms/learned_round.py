"""Learning for each weight whether to round up or down (Nagel et al. 2020, arXiv 2004.10568).

Layer by layer, Adam changes one number a weight so that the layer, on the inputs it gets in the
quantized model, returns what the float layer returns on float inputs. Afterwards the choice is
written into the weight, which then lies on its grid: nothing of it remains in the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from quark_brevitas.algorithms.choices import Choice, fit
from quark_brevitas.algorithms.columns import plain
from quark_brevitas.algorithms.kept import Kept
from quark_brevitas.algorithms.rounding import FLOAT, QUANTIZED, FloatMode
from quark_brevitas.algorithms.walk import Step, Walk, same_rows
from quark_brevitas.options import LearnedRound
from quark_brevitas.preparation import keep_float_weights
from quark_core.batch import Batch
from quark_core.partial import Partial
from quark_core.plan import PlanEntry


class Learning:
    """Learned rounding over the layers of a prepared model.

    Args:
        model: Brevitas's model, its ranges calibrated.
        layers: Layers by their name in the plan.
        entries: Their entries.
        options: How to learn.
        example: One batch.
        seed: Of the samples that are drawn.
        partial: Where finished steps are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Any],
        entries: Mapping[str, PlanEntry],
        options: LearnedRound,
        example: Batch,
        seed: int = 0,
        partial: Partial | None = None,
    ) -> None:
        self._model, self._layers, self._entries, self._options = model, layers, entries, options
        self._seed = seed
        self._kept = Kept(partial or Partial(), options.name, scales=options.learn_scale)
        self._float = FloatMode(model)
        keep_float_weights(layers)
        self._walk = Walk(model, layers, dict.fromkeys(layers, ""), example)
        self._step: Step | None = None
        self._index = 0
        self._received: list[Tensor] = []
        self._wanted: dict[str, list[Tensor]] = {}

    def passes(self) -> Iterator[str]:
        """One pass over the data a step, then its layers learn."""
        steps = self._walk.steps
        for count, step in enumerate(steps, start=1):
            layers = {name: self._layers[name] for name in step.layers}
            if not self._kept.read(count, layers):
                self._step, self._index = step, 0
                self._received, self._wanted = [], {name: [] for name in step.layers}
                yield f"{self._options.name} {count}/{len(steps)}"
                for name in step.layers:
                    self._learn(name)
                self._kept.write(count, layers)
            self._walk.finish(step)

    @property
    def notes(self) -> list[str]:
        """What the user should hear."""
        return self._walk.missed(self._layers)

    def feed(self, batch: Batch) -> None:
        """Keep what the layers of the step receive, and what they should return."""
        assert self._step is not None
        quantized = self._walk.run(self._step, batch, self._index, QUANTIZED)
        with self._float:
            wanted = self._walk.run(self._step, batch, self._index, FLOAT)
        self._index += 1
        for x, beside in zip_longest(quantized, wanted[: len(quantized)]):
            self._received.append(x)
            target = same_rows(x, beside)
            for name in self._step.layers:
                layer = self._layers[name]
                weight = layer.weight_orig.to(layer.weight.device)
                self._wanted[name].append(layer.inner_forward_impl(target, weight, layer.bias))

    def _learn(self, name: str) -> None:
        layer, spec = self._layers[name], self._entries[name].weight
        assert spec is not None
        if not self._received:
            return  # no batch reached it
        choice = Choice(layer, spec, self._options)
        with torch.no_grad():
            samples = [
                pair
                for x, wanted in zip(self._received, self._wanted[name], strict=True)
                for pair in zip(plain(layer.input_quant(x)), wanted, strict=True)
            ]

        def error(drawn: list[int]) -> Tensor:
            weight = choice.weight().to(samples[0][0].dtype)
            total = torch.zeros(())
            for x, wanted in _stacked([samples[at] for at in drawn]):
                out: Tensor = layer.inner_forward_impl(x, weight, layer.bias)
                total = total + (out - wanted).square().sum(1).mean() * len(x)
            return total / len(drawn)

        fit([choice], error, self._samples(name, len(samples)), self._options)
        choice.settle()

    def _samples(self, name: str, count: int) -> Iterator[list[int]]:
        """Samples for each step, the same for a layer whatever was learned before it."""
        generator = torch.Generator().manual_seed(self._seed + crc32(name.encode()))
        size = min(self._options.batch_size, count)
        for _ in range(self._options.iterations):
            yield torch.randint(count, (size,), generator=generator).tolist()


def _stacked(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples of equal shape together: texts may differ in length, and images in size."""
    by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    for pair in pairs:
        by_shape.setdefault(tuple(pair[0].shape), []).append(pair)
    for alike in by_shape.values():
        yield torch.stack([x for x, _ in alike]), torch.stack([wanted for _, wanted in alike])
