"""Quantization-aware training: quantize, train the module, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quark_brevitas.config import BrevitasConfig
from quark_brevitas.plugin import quark_quantizers
from quark_brevitas.quantizer import BrevitasQuantizer
from safetensors.torch import load_file
from torch import Tensor, nn

from quark_core.errors import QuantizationError

EXAMPLE = Path(__file__).parents[3] / "examples" / "fashion_mnist"


@pytest.fixture
def fashion(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The demo's network with its weights."""
    monkeypatch.syspath_prepend(str(EXAMPLE.parents[1]))
    from examples.fashion_mnist.model import build

    model = build()
    model.load_state_dict(load_file(EXAMPLE / "fashion_net.safetensors"))
    return model.eval()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """Images and labels of the demo's test set."""
    found = np.load(EXAMPLE / "data.npz")
    images = (torch.from_numpy(found["test_images"]).float() / 255 - 0.2860) / 0.3530
    return images, torch.from_numpy(found["test_labels"])


def _train(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    """An ordinary loop: nothing in it knows of quantization."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(0, len(images), (32,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _loss(model: Any, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(images), labels))


@pytest.mark.parametrize(
    "fields",
    [
        {"weight": "int2/channel", "input": "int8"},
        {"weight": "int3/channel", "input": "int4/sym", "backend": "fx"},
        {"weight": "int2/tensor/asym", "algorithm": "gptq"},
    ],
)
def test_training_mends_few_bits(
    fashion: nn.Module, data: tuple[Tensor, Tensor], tmp_path: Path, fields: dict[str, Any]
) -> None:
    images, labels = data
    seen, held = slice(0, len(images) * 3 // 4), slice(len(images) * 3 // 4, None)
    quantizer = BrevitasQuantizer(BrevitasConfig(name="brevitas", **fields))
    quantized = quantizer.quantize(fashion, [images[:64]])
    before = _loss(quantized, images[held], labels[held])
    scales = {
        one.tensor: one.scale.clone() for one in quantized.encodings() if one.scale is not None
    }

    _train(quantized.module, images[seen], labels[seen], steps=30)
    trained = quantizer.convert(quantized)

    after = _loss(trained, images[held], labels[held])
    assert after < 0.8 * before, (before, after)
    assert not trained.module.training
    learned = {one.tensor: one.scale for one in trained.encodings() if one.scale is not None}
    assert list(learned) == list(scales)
    moved = [name for name in scales if not torch.equal(learned[name], scales[name])]
    assert len(moved) > len(scales) / 2

    trained.save(tmp_path)
    loaded = quantizer.restore(fashion, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(images[held]), trained(images[held]))
    with pytest.raises(QuantizationError, match="float weights that training"):
        loaded.set_enabled("conv", False)
    trained.set_enabled("conv", False)
    assert _loss(trained, images[held], labels[held]) != after


def test_what_diverged_is_refused(fashion: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    quantizer = BrevitasQuantizer(BrevitasConfig(name="brevitas", weight="int8"))
    quantized = quantizer.quantize(fashion, [data[0][:8]])
    with torch.no_grad():
        next(quantized.module.parameters()).fill_(float("nan"))
    with pytest.raises(QuantizationError, match="values that are not finite"):
        quantizer.convert(quantized)


def test_the_capability_is_told() -> None:
    assert quark_quantizers()[0].capabilities.qat


def test_frozen_weights_stay_frozen(fashion: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    weight = fashion.get_submodule("classifier").get_parameter("weight")
    weight.requires_grad_(False)
    for backend in ("layerwise", "fx"):
        config = BrevitasConfig(name="brevitas", weight="int8", input="int8", backend=backend)
        module = BrevitasQuantizer(config).quantize(fashion, [data[0][:64]]).module
        wanted = {name for name, found in module.named_parameters() if not found.requires_grad}
        assert wanted == {"classifier.weight"}
