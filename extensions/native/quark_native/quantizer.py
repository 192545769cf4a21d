"""NativeQuantizer: quark-native behind the host's interface."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from quark_core.batch import Batch
from quark_core.plan import Plan
from quark_core.quantizer import ModelQuantizer
from quark_native import loading
from quark_native.config import NativeConfig
from quark_native.flows import eager
from quark_native.model import NativeModel
from quark_native.planning import make_plan


@dataclass
class Prepared:
    """A model that still computes in float while its static quantizers observe."""

    model: nn.Module
    plan: Plan


class NativeQuantizer(ModelQuantizer[NativeConfig]):
    """Quantizes the layers of a model where they stand."""

    config_class = NativeConfig

    def plan(self, model: nn.Module, example: Batch | None = None) -> Plan:
        """Decide for each Linear, convolution and Embedding."""
        return make_plan(model, self.config, example)

    def prepare(self, model: nn.Module, plan: Plan, example: Batch | None = None) -> Prepared:
        """Give the plan's layers quantizers that observe."""
        return Prepared(eager.attach(model, plan), plan)

    def calibrate(self, prepared: Prepared, batch: Batch) -> None:
        """Run one batch through the model, in float."""
        batch.run(prepared.model)

    def convert(self, prepared: Prepared) -> NativeModel:
        """Fix the ranges and encode the weights."""
        eager.freeze(prepared.model, prepared.plan, keep_float=self.config.keep_float)
        return self._quantized(prepared.model, prepared.plan)

    def load(self, model: nn.Module, directory: Path, example: Batch | None = None) -> NativeModel:
        """Rebuild what :meth:`NativeModel.save` wrote, in eval mode.

        Args:
            model: The float model; left untouched. Only its structure is used, and its weights
                where a layer is switched to float.
            directory: What was saved.
            example: Not needed.

        Raises:
            QuantizationError: A file is missing or damaged, or does not fit the model.
        """
        plan, tensors = loading.read(Path(directory))
        loading.check_layers(model, plan)
        model = eager.attach(copy.deepcopy(model).eval(), plan)
        loading.restore(model, plan, tensors, keep_float=self.config.keep_float)
        return self._quantized(model, plan)

    def _quantized(self, model: nn.Module, plan: Plan) -> NativeModel:
        options: dict[str, Any] = self.config.model_dump(mode="json")
        return NativeModel(model, plan, options)
