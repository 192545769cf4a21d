"""FashionNet: a small residual CNN for 28x28 grey images."""

from __future__ import annotations

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False),
                nn.BatchNorm2d(outputs),
            )
        # Each use of an activation has a module of its own, so that each can be given
        # quantization parameters of its own.
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu2(y + self.shortcut(x))
        return out


class FashionNet(nn.Module):
    """A stem, three residual stages, global average pooling and a linear classifier.

    Args:
        widths: Channels of the stem and of the three stages, each of which halves the side.
        classes: Number of classes.
    """

    def __init__(
        self, widths: tuple[int, int, int, int] = (16, 32, 64, 96), classes: int = 10
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.stage1 = ResidualBlock(widths[0], widths[1], stride=2)
        self.stage2 = ResidualBlock(widths[1], widths[2], stride=2)
        self.stage3 = ResidualBlock(widths[2], widths[3], stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(widths[3], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Classifies normalised images.

        Args:
            images: Float tensor [N, 1, 28, 28], (pixel / 255 - 0.2860) / 0.3530.

        Returns:
            Logits, [N, classes].
        """
        x = self.relu(self.bn(self.conv(images)))
        x = self.stage3(self.stage2(self.stage1(x)))
        logits: Tensor = self.classifier(self.flatten(self.pool(x)))
        return logits


def build() -> nn.Module:
    """Returns an untrained FashionNet; the trained weights are in fashion_net.safetensors."""
    return FashionNet()
