"""What learned rounding learns: one number a weight, and if wanted a factor a scale.

Adam changes the numbers so that outputs come closer to the float ones; afterwards the choice is
written into the weight, which then lies on its grid, and nothing else remains in the model.
Source: Nagel et al. 2020, arXiv 2004.10568.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from quark_brevitas.algorithms.grid import Grid
from quark_brevitas.options import LearnedRound
from quark_core.spec import TensorSpec

_ZETA, _GAMMA = 1.1, -0.1
"""The sigmoid is stretched to this range, so that 0 and 1 are reached (paper, equation 23)."""
_PENALTY = 0.01
_WARMUP = 0.2
_SHARPEST, _SOFTEST = 2.0, 20.0


def scale_parameter(layer: Any) -> Tensor:
    """Where Brevitas keeps the numbers that the scales of a weight are proportional to."""
    value: Tensor = layer.weight_quant.tensor_quant.scaling_impl.value
    return value


class Choice:
    """The rounding of one layer's weight, while it is learned.

    Args:
        layer: Brevitas's layer.
        spec: Spec of its weight.
        options: What is learned, and how.
    """

    def __init__(self, layer: Any, spec: TensorSpec, options: LearnedRound) -> None:
        self._layer, self._function = layer, options.function
        self._grid = Grid.of(layer, spec)
        flat = layer.weight.detach().float().reshape(layer.weight.shape[0], -1)
        self._counts, self._steps = self._grid.units(flat)
        self._floor = self._counts.floor()
        if self._function == "identity":
            start = torch.zeros_like(self._counts)
        else:
            rest = self._counts - self._floor
            share = (rest - _GAMMA) / (_ZETA - _GAMMA)
            start = torch.logit(share if self._function == "hard_sigmoid" else rest, 1e-4)
        self._value = start.requires_grad_()
        self._gain: Tensor | None = None
        if options.learn_scale:
            # In float16 Adam's smallest number is zero, and steps are divided by it.
            ones = torch.ones_like(scale_parameter(layer), dtype=self._counts.dtype)
            self._gain = ones.requires_grad_()

    def parameters(self, options: LearnedRound) -> list[dict[str, Any]]:
        """What an optimizer changes, at which rates."""
        found = [{"params": [self._value], "lr": options.learning_rate}]
        if self._gain is not None:
            found.append({"params": [self._gain], "lr": options.scale_learning_rate})
        return found

    def weight(self) -> Tensor:
        """The weight between its two roundings, through which gradients flow."""
        if self._function == "identity":
            moved = self._counts + self._value.clamp(-0.5, 0.5)
            counts = moved + (moved.round() - moved).detach()
        else:
            counts = self._floor + self._share()
        return self._scaled(self._grid.clamp(counts, self._steps))

    def settle(self) -> None:
        """Write the choice into the layer, and its scales."""
        if self._function == "identity":
            counts = (self._counts + self._value.detach().clamp(-0.5, 0.5)).round()
        else:
            counts = self._floor + (self._share() > 0.5)
        with torch.no_grad():
            self._layer.weight.copy_(self._scaled(self._grid.clamp(counts, self._steps)))
            if self._gain is not None:
                scale_parameter(self._layer).mul_(self._gain)

    def penalty(self, sharpness: float) -> Tensor:
        """Largest where a weight is undecided."""
        if self._function == "identity":
            return self._value.sum() * 0
        return (1 - (2 * self._share() - 1).abs().pow(sharpness)).sum()

    def _share(self) -> Tensor:
        share = torch.sigmoid(self._value)
        if self._function == "hard_sigmoid":
            return (share * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)
        return share

    def _scaled(self, values: Tensor) -> Tensor:
        shape = self._layer.weight.shape
        if self._gain is None:
            return values.reshape(shape)
        gain = self._gain
        if gain.numel() in (1, shape[0]):
            return (values * gain.reshape(-1, 1)).reshape(shape)
        groups = gain.reshape(shape[0], -1, 1)
        return (values.reshape(shape[0], groups.shape[1], -1) * groups).reshape(shape)


def fit(
    choices: Sequence[Choice],
    error: Callable[[Any], Tensor],
    samples: Iterable[Any],
    options: LearnedRound,
) -> None:
    """Learn choices together.

    Args:
        choices: What is learned.
        error: The error on some samples, a scalar.
        samples: What ``error`` is given, one item a step.
        options: Steps and rates.
    """
    groups = [group for choice in choices for group in choice.parameters(options)]
    learned = [tensor for group in groups for tensor in group["params"]]
    optimizer = torch.optim.Adam(groups)
    with torch.enable_grad():
        for iteration, drawn in enumerate(samples):
            loss = error(drawn)
            past = iteration / options.iterations - _WARMUP
            if past > 0:
                cooling = _SOFTEST + (_SHARPEST - _SOFTEST) * past / (1 - _WARMUP)
                for choice in choices:
                    loss = loss + _PENALTY * choice.penalty(cooling)
            if not loss.requires_grad:
                continue  # no layer that learns was called on this sample
            # Only what is learned gets gradients: those of the model's own would pile up. Layers
            # that this sample did not call, as other experts', get none.
            gradients = torch.autograd.grad(loss, learned, allow_unused=True)
            for tensor, gradient in zip(learned, gradients, strict=True):
                tensor.grad = gradient
            optimizer.step()
