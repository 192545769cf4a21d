"""TrainableModel: fake-quantized and open to the user's own training, then converted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import fx, nn

from quark_core.plan import Plan
from quark_core.quantized import Encoding, QuantizedModel
from quark_pt2e.graph.training import set_mode
from quark_pt2e.model import Layer, Pt2eModel
from quark_pt2e.module import GraphRunner, fingerprint

Finish = Callable[[fx.GraphModule], Pt2eModel]
"""Converts a graph with fake quantizers."""


class TrainableRunner(GraphRunner):
    """A graph with fake quantizers that ``train()`` and ``eval()`` switch as in any module.

    In training, batch norms and dropouts train and ranges follow the data; in evaluation both
    stand still. Parameters are the float model's, under names of the graph.
    """

    def train(self, mode: bool = True) -> Self:
        """Switch to training, or to evaluation."""
        self.training = mode
        set_mode(self.graph, training=mode, observing=mode)
        self.forget_taps()
        return self


class TrainableModel(QuantizedModel):
    """What ``qat: true`` gives: train ``module`` in a loop of your own, then call :meth:`convert`.

    Encodings, sizes, files and exports are those of the converted model at the moment of asking.

    Attributes:
        layers: What each plan entry is in the graph with fake quantizers.
        record: What calibration did.
    """

    module: TrainableRunner

    def __init__(
        self,
        module: TrainableRunner,
        plan: Plan,
        *,
        layers: dict[str, Layer],
        finish: Finish,
        record: dict[str, Any],
    ) -> None:
        super().__init__(module, plan)
        self.layers, self.record = layers, record
        self._finish = finish
        self._converted: tuple[int, Pt2eModel] | None = None

    def convert(self) -> Pt2eModel:
        """The quantized model with the weights and ranges as they are now.

        The module stays as it is, so that training can go on. As long as it has not changed, the
        model converted last is returned: torchao takes long to fold batch norms.
        """
        state = fingerprint(self.module)
        if self._converted is None or self._converted[0] != state:
            self._converted = (state, self._convert())
        converted = self._converted[1]
        converted.float_tensors = self.float_tensors
        converted.float_model, converted.evaluation = self.float_model, self.evaluation
        return converted

    def _convert(self) -> Pt2eModel:
        graph = copy.deepcopy(self.module.graph)
        set_mode(graph, training=False, observing=False)
        with torch.no_grad():
            return self._finish(graph)

    def encodings(self) -> list[Encoding]:
        """Scale and zero point of each quantized tensor, after conversion."""
        return self.convert().encodings()

    def layer(self, name: str) -> nn.Module | None:
        """A tap at the layer's node: called with its output while something listens."""
        found = self.layers.get(name)
        return None if found is None else self.module.tap(name, found.place)

    def counterpart(self, name: str) -> str | None:
        """The float module whose output the node stands for."""
        found = self.layers.get(name)
        return None if found is None else found.counterpart

    def storage(self) -> dict[str, int]:
        """Packed bytes of the tensors of the converted model."""
        return self.convert().storage()

    def save(self, directory: Path) -> None:
        """Write the converted model; it is loaded as such, no longer trainable."""
        self.convert().save(directory)

    def export(self, name: str, path: Path) -> Path:
        """Write the converted model in one of the backend's own forms.

        Raises:
            ExportError: There is no such form, or the model does not fit it.
        """
        return self.convert().export(name, path)
