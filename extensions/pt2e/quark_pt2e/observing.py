"""Observers by the host's names, headroom, and when ranges have settled."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torchao.quantization.pt2e import (
    FakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)
from torchao.quantization.pt2e.quantizer import QuantizationSpec

from quark_core.spec import TensorSpec

_STATIC: dict[str, type] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageMinMaxObserver,
    "mse": HistogramObserver,
}

_MOVING = (MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver)


def activation(
    spec: TensorSpec,
    dtype: torch.dtype,
    limits: tuple[int, int],
    *,
    floor: float,
    headroom: float = 1.0,
    qat: bool = False,
) -> QuantizationSpec:
    """Torchao's spec for a tensor between operations.

    Args:
        spec: The host's spec, resolved.
        dtype: In which codes are stored.
        limits: Smallest and largest code.
        floor: Smallest scale.
        headroom: Factor on static ranges.
        qat: Round as well as watch.
    """
    scheme = torch.per_tensor_symmetric if spec.symmetric else torch.per_tensor_affine
    options: dict[str, Any] = {"eps": floor}
    if spec.dynamic:
        observer: Any = PlaceholderObserver
    else:
        assert spec.observer is not None
        observer = _STATIC[spec.observer.name]
        if spec.observer.name == "moving_average":
            options["averaging_constant"] = spec.observer.momentum
        if headroom != 1.0:
            observer = with_headroom(observer)
            options["headroom"] = headroom
    return QuantizationSpec(
        dtype=dtype,
        quant_min=limits[0],
        quant_max=limits[1],
        qscheme=scheme,
        is_dynamic=spec.dynamic,
        observer_or_fake_quant_ctr=_maker(observer, options, qat=qat),
    )


def _maker(observer: Any, options: dict[str, Any], *, qat: bool) -> Any:
    if not qat:
        return observer.with_args(**options)
    if observer is PlaceholderObserver:
        # A moving average that forgets at once takes each batch's own range.
        once = MovingAverageMinMaxObserver.with_args(averaging_constant=1)
        return FakeQuantize.with_args(observer=once, **options)
    fake = FusedMovingAvgObsFakeQuantize if observer in _MOVING else FakeQuantize
    return fake.with_args(observer=observer, **options)


def weight(
    spec: TensorSpec,
    dtype: torch.dtype,
    limits: tuple[int, int],
    *,
    floor: float,
    qat: bool = False,
    follows: bool = False,
) -> QuantizationSpec:
    """Torchao's spec for a weight: symmetric, per tensor or per output channel.

    Args:
        spec: The host's spec, resolved.
        dtype: In which codes are stored.
        limits: Smallest and largest code.
        floor: Smallest scale.
        qat: Round as well as watch.
        follows: In training, let the range follow the weights, up and down.
    """
    assert spec.granularity is not None
    channel = spec.granularity.kind == "channel"
    if qat and follows:
        observer = _MOVING[1] if channel else _MOVING[0]
    else:
        observer = PerChannelMinMaxObserver if channel else MinMaxObserver
    return QuantizationSpec(
        dtype=dtype,
        quant_min=limits[0],
        quant_max=limits[1],
        qscheme=torch.per_channel_symmetric if channel else torch.per_tensor_symmetric,
        ch_axis=0,
        is_dynamic=False,
        observer_or_fake_quant_ctr=_maker(observer, {"eps": floor}, qat=qat),
    )


@functools.cache
def with_headroom(observer: type) -> Any:
    """A subclass of a range observer that widens what it saw by a factor."""

    class Widened(observer):  # type: ignore[misc]
        def __init__(self, *args: Any, headroom: float = 1.0, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.headroom = headroom

        def _calculate_qparams(self, low: torch.Tensor, high: torch.Tensor) -> Any:
            return super()._calculate_qparams(low * self.headroom, high * self.headroom)

    Widened.__name__ = f"Widened{observer.__name__}"
    return Widened


def observers(graph: nn.Module) -> list[Any]:
    """The modules of a graph that keep a smallest and a largest value."""
    return [
        module
        for module in graph.modules()
        if isinstance(getattr(module, "min_val", None), torch.Tensor)
        and isinstance(getattr(module, "max_val", None), torch.Tensor)
    ]


class Ranges:
    """Watches the ranges of all observers of a graph, batch after batch.

    Args:
        graph: The graph with observers.
        tolerance: Largest relative change that counts as standing still.
        patience: How many looks in a row must find no larger change.
    """

    def __init__(self, graph: nn.Module, tolerance: float, patience: int) -> None:
        self._observers = observers(graph)
        self._tolerance, self._patience = tolerance, patience
        self._last: torch.Tensor | None = None
        self._still = 0

    @property
    def settled(self) -> bool:
        """Whether the ranges stood still long enough."""
        return self._still >= self._patience

    def look(self) -> None:
        """Compare the ranges with those at the last look."""
        spans = [
            torch.stack([module.min_val.min(), module.max_val.max()]).double()
            for module in self._observers
            if module.min_val.numel()
        ]
        now = torch.stack(spans) if spans else torch.zeros(0, 2)
        before, self._last = self._last, now
        if before is None or before.shape != now.shape:
            self._still = 0
            return
        width = (now[:, 1] - now[:, 0]).clamp(min=1e-12)
        change = ((now - before).abs().amax(1) / width).max() if len(now) else torch.tensor(0.0)
        self._still = self._still + 1 if float(change) <= self._tolerance else 0
