"""Networks the tests quantize."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
    """Two convolutions around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        out: Tensor = self.relu2(self.bn2(self.conv2(y)) + x)
        return out


def _stage(inputs: int, outputs: int, size: int, **options: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class GoldenNet(nn.Module):
    """The network the reference results were made with."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _stage(3, 16, 3)
        self.block1 = Block(16)
        self.down = _stage(16, 32, 3, stride=2)
        self.dw = _stage(32, 32, 3, groups=32)
        self.pw = _stage(32, 64, 1)
        self.block2 = Block(64)
        self.pool = nn.AdaptiveAvgPool2d((1, 1))
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.pw(self.dw(self.down(self.block1(self.stem(x))))))
        out: Tensor = self.fc(self.flatten(self.pool(x)))
        return out


@pytest.fixture
def golden_model() -> nn.Module:
    """That network with its weights."""
    model = GoldenNet().eval()
    model.load_state_dict(load_file(GOLDEN / "cnn.safetensors"))
    return model


class Tiny(nn.Module):
    """One of each layer the backend knows, with and without bias and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.flatten = nn.Flatten(2)
        self.conv1d = nn.Conv1d(3, 4, 3)
        self.up1d = nn.ConvTranspose1d(4, 2, 2)
        self.fc = nn.Linear(2 * 63, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.flatten(self.up(self.relu(self.bn(self.conv(x)))))
        y = self.up1d(self.conv1d(y))
        out: Tensor = self.fc(y.flatten(1))
        return out


@pytest.fixture
def tiny() -> nn.Module:
    """A small network with running statistics that are not the defaults."""
    torch.manual_seed(0)
    model = Tiny()
    for _ in range(3):
        model(torch.randn(8, 2, 4, 4) * 2 + 1)
    return model.eval()


@pytest.fixture
def batches() -> list[Tensor]:
    """Inputs for it."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 2, 4, 4, generator=generator) * 2 + 1 for _ in range(3)]
