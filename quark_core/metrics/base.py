"""What a metric is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from quark_core.errors import DataError


class Metric(ABC):
    """Accumulates over batches and ends in one number.

    ``takes_context`` metrics get the recipe's :class:`~quark_core.sources.context.Context` as
    keyword ``context``.
    """

    takes_context = False

    @abstractmethod
    def update(
        self,
        output: torch.Tensor,
        target: torch.Tensor | None,
        reference: torch.Tensor | None,
    ) -> None:
        """Take in one batch.

        Args:
            output: The model's main output, ``[batch, ...]``.
            target: The right answers, or None if the data have none.
            reference: The float model's output for the same batch, where the metric needs it.
        """

    @abstractmethod
    def compute(self) -> float:
        """The metric over all batches seen."""


def require_target(target: torch.Tensor | None, name: str) -> torch.Tensor:
    """The target, refused if there is none.

    Raises:
        DataError: The data have no targets.
    """
    if target is None:
        raise DataError(
            f"metric {name!r} needs labels, the evaluation data have none",
            where="evaluate.metrics",
            fix="Give data.evaluation a target, or use sqnr, cosine, kl or top1_agreement",
        )
    return target


def require_reference(
    output: torch.Tensor, reference: torch.Tensor | None, name: str
) -> torch.Tensor:
    """The float model's output, refused if it is missing or of another shape.

    Raises:
        DataError: There is none, or its shape differs.
    """
    if reference is None:
        raise DataError(f"metric {name!r} needs the float model's outputs", where=name)
    if reference.shape != output.shape:
        raise DataError(
            f"metric {name!r}: output {list(output.shape)}, reference {list(reference.shape)}",
            where="evaluate.metrics",
        )
    return reference


def logits_and_labels(
    output: torch.Tensor, target: torch.Tensor | None, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[n, classes]`` and labels ``[n]`` of all positions that have a right answer.

    The classes are the last axis; for images ``[batch, classes, height, width]`` they are the
    second, recognised by the target's shape. Labels of -100 are left out.

    Raises:
        DataError: There is no target, or its shape does not fit.
    """
    labels = require_target(target, name).to(output.device)
    if output.shape[:-1] == labels.shape:
        logits = output
    elif output.ndim > 2 and output.shape[:1] + output.shape[2:] == labels.shape:
        logits = output.movedim(1, -1)
    else:
        raise DataError(
            f"metric {name!r}: output {list(output.shape)} does not fit labels "
            f"{list(labels.shape)}",
            where="evaluate.metrics",
            fix="Labels have the output's shape without its classes",
        )
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    kept = labels != -100
    return logits[kept], labels[kept]


def mean(total: float, count: int, name: str) -> float:
    """``total / count``, refused over nothing.

    Raises:
        DataError: No batch was seen.
    """
    if count == 0:
        raise DataError(f"metric {name!r} saw no samples", where="data.evaluation")
    return total / count
