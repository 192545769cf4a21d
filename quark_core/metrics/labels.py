"""Metrics against labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from quark_core.errors import DataError
from quark_core.metrics.base import Metric, logits_and_labels, mean
from quark_core.sources import code
from quark_core.sources.context import Context


class TopK(Metric):
    """Share of positions whose label is among the ``k`` largest logits, 0 to 1.

    Raises:
        ValueError: ``k`` is less than 1.
    """

    def __init__(self, k: int = 1) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        self._k, self._right, self._count = k, 0, 0
        self._name = f"top{k}"

    def update(
        self, output: torch.Tensor, target: torch.Tensor | None, reference: torch.Tensor | None
    ) -> None:
        """Count the hits of one batch."""
        logits, labels = logits_and_labels(output, target, self._name)
        if self._k > logits.shape[-1]:
            raise DataError(f"k is {self._k}, the model has {logits.shape[-1]} classes")
        hits = logits.topk(self._k, dim=-1).indices == labels[:, None]
        self._right += int(hits.sum())
        self._count += len(labels)

    def compute(self) -> float:
        """Hits over positions."""
        return mean(self._right, self._count, self._name)


class Accuracy(TopK):
    """Share of positions whose label has the largest logit (top-1), 0 to 1."""

    def __init__(self) -> None:
        super().__init__(1)
        self._name = "accuracy"


class Top5(TopK):
    """Share of positions whose label is among the five largest logits, 0 to 1."""

    def __init__(self) -> None:
        super().__init__(5)


class Perplexity(Metric):
    """exp of the mean negative log likelihood of the labels, in nats.

    For a language model the target of a position is the token that follows it, and -100 where
    there is none.
    """

    def __init__(self) -> None:
        self._loss, self._count = 0.0, 0

    def update(
        self, output: torch.Tensor, target: torch.Tensor | None, reference: torch.Tensor | None
    ) -> None:
        """Add one batch's loss."""
        logits, labels = logits_and_labels(output, target, "perplexity")
        loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        self._loss += float(loss.double().sum())
        self._count += len(labels)

    def compute(self) -> float:
        """Perplexity, infinite where the loss is past what a float can hold."""
        try:
            return math.exp(mean(self._loss, self._count, "perplexity"))
        except OverflowError:
            return math.inf


class PythonMetric(Metric):
    """The mean over samples of what a function of the recipe returns for each batch.

    Args:
        function: ``file.py:name`` or ``module:name`` of a function (output, target) -> float,
            the mean over the batch.
        context: The recipe's surroundings.
    """

    takes_context = True

    def __init__(self, function: str, context: Context) -> None:
        self._name = function
        self._function: Callable[..., Any] = code.load_callable(
            function, context, "evaluate.metrics"
        )
        self._total, self._count = 0.0, 0

    def update(
        self, output: torch.Tensor, target: torch.Tensor | None, reference: torch.Tensor | None
    ) -> None:
        """Call the function on one batch."""
        try:
            value = float(self._function(output, target))
        except Exception as error:
            raise DataError(
                f"metric {self._name!r} raised {type(error).__name__}",
                where="evaluate.metrics",
                cause=str(error) or None,
                fix="It is called as function(output, target) and returns a number",
            ) from error
        samples = len(output) if output.ndim else 1
        self._total += value * samples
        self._count += samples

    def compute(self) -> float:
        """The mean over samples."""
        return mean(self._total, self._count, self._name)
