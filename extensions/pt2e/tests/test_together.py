"""Brevitas and ExecuTorch in one environment and one process."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from quark_core.registry import registry


def test_both_quantize_one_model(golden_model: nn.Module, golden_inputs: Any) -> None:
    images = torch.from_numpy(golden_inputs["calib"])
    with torch.no_grad():
        truth = golden_model(images)
    outputs = {}
    for name in ("brevitas", "ethos-u", "xnnpack", "native", "brevitas"):
        config = registry().config_class(name)(name=name, weight="int8", input="int8")
        quantized = registry().quantizer_class(name)(config).quantize(golden_model, [images])
        with torch.no_grad():
            output = quantized(images)
        noise = (truth - output).square().sum() / truth.square().sum()
        assert float(noise) < 0.01, name
        # Nothing that another backend did in between changes a result.
        assert torch.equal(outputs.setdefault(name, output), output)
    assert version("brevitas") == "0.13.4"
    assert version("executorch") == "1.5.1"
