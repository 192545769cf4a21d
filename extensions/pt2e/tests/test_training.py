"""Quantization-aware training: the user's loop on the module, then conversion."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from quark_pt2e.backends.arm import EthosUBackend
from quark_pt2e.backends.desktop import XnnpackBackend
from quark_pt2e.backends.factory import FactoryBackend
from quark_pt2e.config.arm import EthosUConfig
from quark_pt2e.config.desktop import XnnpackConfig
from quark_pt2e.config.factory import FactoryConfig
from quark_pt2e.graph.training import hoist_constants, set_mode
from quark_pt2e.trainable import TrainableModel
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

from quark_core.batch import Batch
from quark_core.errors import ConfigError, QuantizationError

QAT = {"weight": "int8/channel", "input": "int8/moving_average", "qat": True}
XNNPACK = "executorch.backends.xnnpack.quantizer.xnnpack_quantizer"


class Small(nn.Module):
    """A convolution with batch norm, dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x))).mean((2, 3))
        out: Tensor = self.head(self.drop(x))
        return out


def _data() -> tuple[Tensor, Tensor]:
    """Images whose class is whether their upper half is brighter."""
    images = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(64) % 2
    images[:, :, :6] += (labels * 2.0 - 1.0)[:, None, None, None]
    images[:, :, 6:] -= (labels * 1.0 - 0.5)[:, None, None, None]
    return images, labels


def _train(module: nn.Module, steps: int) -> list[float]:
    images, labels = _data()
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
def test_trained_and_converted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, (images, labels) = Small(), _data()
    before = copy.deepcopy(model.state_dict())
    backend = EthosUBackend(EthosUConfig(name="ethos-u", **QAT))
    quantized = backend.quantize(model, [images])
    assert isinstance(quantized, TrainableModel)
    first = quantized.convert()
    assert quantized.convert() is first

    losses = _train(quantized.module.train(), 30)
    quantized.module.eval()
    assert losses[-1] < losses[0] / 2
    # The user's model is not what was trained.
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    final = quantized.convert()
    assert final is not first
    with torch.no_grad():
        trained, converted = quantized(images), final(images)
        # Evaluating moves no range.
        assert torch.equal(trained, quantized(images))
    assert float((trained.argmax(1) == labels).float().mean()) > 0.9
    assert float((converted.argmax(1) == trained.argmax(1)).float().mean()) > 0.95
    assert float((converted - trained).abs().max()) < 0.1 * float(trained.abs().max())

    # The batch norm is folded: one integer convolution, with its activation.
    calls = [node.name for node in final.graph.graph.nodes if node.op == "call_function"]
    assert not any("batch_norm" in name for name in calls)
    entry = final.plan["conv"]
    assert (str(entry.weight), entry.output) == ("int8/channel/sym", None)
    assert final.counterpart("conv") == "bn"
    tensors = {row.tensor for row in final.encodings()}
    assert {"conv.input", "conv.weight", "act.output", "head.weight"} <= tensors
    quantized.save(tmp_path)
    assert torch.equal(backend.restore(model, tmp_path)(images), converted)
    with pytest.raises(QuantizationError, match="converted graph cannot be trained"):
        final.module.train()


@pytest.mark.slow
def test_as_direct_calls() -> None:
    """The same steps on the module and on torchao's own graph end in the same integers."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    images, _ = _data()
    torch.manual_seed(0)
    model = Small()
    model.drop.p = 0.0
    fields = {**QAT, "input": "int8/moving_average:0.01"}
    ours = XnnpackBackend(XnnpackConfig(name="xnnpack", **fields)).quantize(model, [images])
    assert isinstance(ours, TrainableModel)

    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    shapes = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(model.train(), (images,), dynamic_shapes=shapes)
    theirs = prepare_qat_pt2e(
        program.module(check_guards=False), XNNPACKQuantizer().set_global(config)
    )
    set_mode(theirs, training=False, observing=True)
    with torch.no_grad():
        theirs(images)
    set_mode(theirs, training=True, observing=True)

    assert _train(ours.module.train(), 5) == _train(theirs, 5)
    set_mode(theirs, training=False, observing=False)
    with torch.no_grad():
        assert torch.equal(ours.convert()(images), convert_pt2e(theirs)(images))


def test_dropouts_keep_their_probability() -> None:
    model = Small().train()
    model.drop.p = 0.3
    graph = torch.export.export(model, (torch.randn(4, 3, 12, 12),)).module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    for training in (False, True):
        set_mode(graph, training=training, observing=training)
        found = {node.name: node.args for node in graph.graph.nodes}
        assert found["dropout"][1:] == (0.3, training)
        assert found["batch_norm"][5] is training


def test_constants_come_first() -> None:
    graph = torch.export.export(Small().eval(), (torch.randn(4, 3, 12, 12),)).module()
    assert isinstance(graph, fx.GraphModule)
    hoist_constants(graph)
    kinds = [node.op == "get_attr" for node in graph.graph.nodes]
    assert kinds == sorted(kinds, reverse=True)


def test_what_cannot_be_trained(cond_model: nn.Module, golden_inputs: Any) -> None:
    with pytest.raises(ConfigError, match="training needs batches"):
        EthosUConfig(name="ethos-u", **QAT, batch="static")
    backend = EthosUBackend(EthosUConfig(name="ethos-u", **QAT))
    example = Batch((torch.from_numpy(golden_inputs["calib_x"]), torch.ones(1)))
    with pytest.raises(QuantizationError, match="branches of torch.cond cannot be trained"):
        backend.make_plan(cond_model, example)


@pytest.mark.parametrize(("trains", "qat"), [(True, False), (False, True)])
def test_their_configuration_must_agree(trains: bool, qat: bool) -> None:
    config = FactoryConfig(
        name="pt2e",
        quantizer_class=f"{XNNPACK}:XNNPACKQuantizer",
        config_factory=f"{XNNPACK}:get_symmetric_quantization_config",
        config_arguments={"is_qat": trains},
        qat=qat,
    )
    linear = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(QuantizationError, match=f"Write is_qat: {str(qat).lower()}"):
        FactoryBackend(config).make_plan(linear, torch.randn(2, 4))
