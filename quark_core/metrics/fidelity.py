"""Metrics against the float model's own outputs: no labels needed, no damage hidden."""

from __future__ import annotations

import math

import torch

from quark_core.metrics.base import Metric, mean, require_reference


class Sqnr(Metric):
    """Signal to quantization noise ratio in dB: 10 log10(sum r^2 / sum (r - o)^2).

    The sums run over all elements of all batches; r is the float model's output. Infinite if
    the outputs are equal.
    """

    def __init__(self) -> None:
        self._signal, self._noise = 0.0, 0.0

    def update(
        self, output: torch.Tensor, target: torch.Tensor | None, reference: torch.Tensor | None
    ) -> None:
        """Add one batch's powers."""
        truth = require_reference(output, reference, "sqnr").double()
        self._signal += float(truth.square().sum())
        self._noise += float((truth - output.double()).square().sum())

    def compute(self) -> float:
        """The ratio in dB."""
        if self._noise == 0:
            return math.inf
        return 10 * math.log10(self._signal / self._noise) if self._signal else -math.inf


class Mse(Metric):
    """Mean squared difference from the float model's output."""

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def update(
        self, output: torch.Tensor, target: torch.Tensor | None, reference: torch.Tensor | None
    ) -> None:
        """Add one batch's squares."""
        truth = require_reference(output, reference, "mse").double()
        self._total += float((truth - output.double()).square().sum())
        self._count += output.numel()

    def compute(self) -> float:
        """The mean over all elements."""
        return mean(self._total, self._count, "mse")


class Cosine(Metric):
    """Mean over samples of the cosine between the output and the float model's, -1 to 1.

    Two zero vectors count as equal (1), one zero vector as orthogonal (0).
    """

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def update(
        self, output: torch.Tensor, target: torch.Tensor | None, reference: torch.Tensor | None
    ) -> None:
        """Add one batch's cosines."""
        truth = require_reference(output, reference, "cosine").double().flatten(1)
        found = output.double().flatten(1)
        dots = (truth * found).sum(1)
        norms = truth.norm(dim=1) * found.norm(dim=1)
        both_zero = (truth.norm(dim=1) == 0) & (found.norm(dim=1) == 0)
        cosines = torch.where(norms > 0, dots / norms.clamp(min=1e-300), both_zero.double())
        self._total += float(cosines.sum())
        self._count += len(cosines)

    def compute(self) -> float:
        """The mean over samples."""
        return mean(self._total, self._count, "cosine")


class KlDivergence(Metric):
    """Mean over positions of KL(float || quantized) between the softmaxes, in nats.

    A position is every index but the last axis, which holds the classes.
    """

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def update(
        self, output: torch.Tensor, target: torch.Tensor | None, reference: torch.Tensor | None
    ) -> None:
        """Add one batch's divergences."""
        truth = require_reference(output, reference, "kl")
        expected = truth.float().log_softmax(-1)
        found = output.float().log_softmax(-1)
        # Where the float model gives no probability at all, the term is zero by definition.
        terms = torch.where(expected > -math.inf, expected.exp() * (expected - found), 0.0)
        self._total += float(terms.sum(-1).double().sum())
        self._count += terms[..., 0].numel()

    def compute(self) -> float:
        """The mean over positions."""
        return mean(self._total, self._count, "kl")


class Top1Agreement(Metric):
    """Share of positions where both models have their largest logit in the same place, 0 to 1."""

    def __init__(self) -> None:
        self._same, self._count = 0, 0

    def update(
        self, output: torch.Tensor, target: torch.Tensor | None, reference: torch.Tensor | None
    ) -> None:
        """Count one batch's agreements."""
        truth = require_reference(output, reference, "top1_agreement")
        same = output.argmax(-1) == truth.argmax(-1)
        self._same += int(same.sum())
        self._count += same.numel()

    def compute(self) -> float:
        """Agreements over positions."""
        return mean(self._same, self._count, "top1_agreement")
