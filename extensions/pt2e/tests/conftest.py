"""Networks the tests quantize."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums come in the same order on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    """A depthwise and a pointwise convolution beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.act = nn.ReLU6()
        self.pw = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.pw(self.act(self.bn1(self.dw(x))))
        return out


class GoldenNet(nn.Module):
    """The network the reference results were made with."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.block1 = Block()
        self.block2 = Block()
        self.expand = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.hs = nn.Hardswish()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.relu(self.bn(self.stem(x)))))
        out: Tensor = self.head(self.pool(self.hs(self.expand(x))).flatten(1))
        return out


class CondNet(nn.Module):
    """A network that branches on an input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(256, 5)

    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))

        def yes(value: Tensor) -> Tensor:
            return torch.relu(self.a(value))

        def no(value: Tensor) -> Tensor:
            out: Tensor = self.b(value) + value
            return out

        y = torch.cond(flag.sum() > 0, yes, no, (y,))
        out: Tensor = self.head(y.flatten(1))
        return out


def _golden(name: str, model: nn.Module) -> nn.Module:
    model.load_state_dict(load_file(GOLDEN / f"{name}.safetensors"))
    return model.eval()


@pytest.fixture
def golden_model() -> nn.Module:
    """The network of the reference results, with its weights."""
    return _golden("cnn", GoldenNet())


@pytest.fixture
def cond_model() -> nn.Module:
    """The branching network of the reference results."""
    return _golden("cond", CondNet())


@pytest.fixture(scope="session")
def golden_inputs() -> Any:
    """Calibration and test images of the reference results."""
    return np.load(GOLDEN / "inputs.npz")
