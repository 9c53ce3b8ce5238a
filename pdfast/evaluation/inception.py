"""FID: the 2048 pooled features of Inception v3 as published for it, from a file of weights that the user gives.

The file is the pytorch-fid project's pt_inception-2015-12-05 (.pth), known by its hash; of any other, be it the same tensors
as safetensors, nothing proves that it gives the FID, and the space has another name. The network is
that of Szegedy et al. 2015 (arXiv 1512.00567) with the habits of the TensorFlow graph it was exported from: images
resized to 299 x 299, bilinear without antialias; inputs in [-1, 1]; padding left out of every average; a maximum in
place of the average in the last block; 1008 classes. Its structure is tested, its values were not compared with
published features: check a known FID before you quote one.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from pdfast.io.errors import UsageError
from pdfast.io.files import sha256
from pdfast.io.names import utf8_path
from pdfast.io.reading import no_file

# Of https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

Kernel = int | tuple[int, int]
Layer = tuple[str, int, Kernel]  # name, output channels, kernel


class _Conv(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, kernel: Kernel, stride: int = 1, padding: str | int = "same"
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Branches of convolutions and one of pooling, concatenated; `reduce` halves the image in each branch's last layer.

    A branch whose last layers end in `a` and `b` forks there. pool: (average or maximum, channels of its convolution).
    """

    def __init__(
        self,
        in_channels: int,
        branches: Sequence[Sequence[Layer]],
        pool: tuple[str, int] | None = None,
        reduce: bool = False,
    ) -> None:
        super().__init__()
        self.branches = [[name for name, _, _ in branch] for branch in branches]
        self.pool = pool[0] if pool else None
        for branch in branches:
            width = in_channels
            for i, (name, channels, kernel) in enumerate(branch):
                last = reduce and i == len(branch) - 1
                self.add_module(name, _Conv(width, channels, kernel, 2, 0) if last else _Conv(width, channels, kernel))
                width = channels
        if pool:
            self.branch_pool = _Conv(in_channels, pool[1], 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for names in self.branches:
            y, forks = x, []
            for name in names:
                layer = self.get_submodule(name)
                if name[-1] in "ab":
                    forks.append(layer(y))
                else:
                    y = layer(y)
            outputs += forks or [y]
        if self.pool == "average":
            outputs.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        elif self.pool == "maximum":
            outputs.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))
        else:
            outputs.append(F.max_pool2d(x, 3, 2))
        return torch.cat(outputs, 1)


def _block_a(in_channels: int, pool_channels: int) -> _Mixed:
    return _Mixed(
        in_channels,
        [
            [("branch1x1", 64, 1)],
            [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ],
        ("average", pool_channels),
    )


def _block_b() -> _Mixed:
    double = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    return _Mixed(288, [[("branch3x3", 384, 3)], double], reduce=True)


def _block_c(width: int) -> _Mixed:
    row, column = (1, 7), (7, 1)
    double: list[tuple[Kernel, int]] = [(1, width), (column, width), (row, width), (column, width), (row, 192)]
    return _Mixed(
        768,
        [
            [("branch1x1", 192, 1)],
            [("branch7x7_1", width, 1), ("branch7x7_2", width, row), ("branch7x7_3", 192, column)],
            [(f"branch7x7dbl_{i}", channels, kernel) for i, (kernel, channels) in enumerate(double, 1)],
        ],
        ("average", 192),
    )


def _block_d() -> _Mixed:
    kernels: tuple[Kernel, ...] = (1, (1, 7), (7, 1), 3)
    return _Mixed(
        768,
        [
            [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)],
            [(f"branch7x7x3_{i}", 192, kernel) for i, kernel in enumerate(kernels, 1)],
        ],
        reduce=True,
    )


def _block_e(in_channels: int, pool: str) -> _Mixed:
    row, column = (1, 3), (3, 1)
    double = [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3)]
    return _Mixed(
        in_channels,
        [
            [("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), ("branch3x3_2a", 384, row), ("branch3x3_2b", 384, column)],
            [*double, ("branch3x3dbl_3a", 384, row), ("branch3x3dbl_3b", 384, column)],
        ],
        (pool, 192),
    )


class InceptionV3(nn.Module):
    """The network under the published parameter names: float [n, 3, 299, 299] in [-1, 1] -> [n, 2048].

    `fc` makes logits of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, padding=0)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _block_b()
        self.Mixed_6b = _block_c(128)
        self.Mixed_6c = _block_c(160)
        self.Mixed_6d = _block_c(160)
        self.Mixed_6e = _block_c(192)
        self.Mixed_7a = _block_d()
        self.Mixed_7b = _block_e(1280, "average")
        self.Mixed_7c = _block_e(2048, "maximum")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))


class InceptionFeatures(nn.Module):
    """uint8 images [n, 1 or 3, H, W] -> float32 [n, 2048]. UsageError for a file that holds any other network.

    Called FID with the published file; with another FD-Inception, and a warning says so.
    """

    num_features = 2048
    natural = True

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.network = InceptionV3().requires_grad_(False)
        self.network.load_state_dict(_read_weights(weights, self.network.state_dict()))
        self.sha256 = sha256(weights)
        self.name = "FID" if self.sha256 == SHA256 else "FD-Inception"
        if self.sha256 != SHA256:
            warnings.warn(
                f"{weights} (SHA-256 {self.sha256}) is not the published pt_inception-2015-12-05 ({SHA256}): its figures are "
                "called FD-Inception, not FID, and compare with those of the same file only",
                stacklevel=2,
            )
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = images.expand(-1, 3, -1, -1).float() / 255
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        return self.network((2 * x - 1).contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Return float32 [n, 2048] -> [n, 1008], without the classifier's bias, as the published Inception score has them."""
        return F.linear(features, self.network.fc.weight)


def check_weights(path: Path) -> None:
    """Raise a UsageError where there is no such file, or it does not hold the network."""
    with torch.device("meta"):
        expected = InceptionV3().state_dict()
    _read_weights(path, expected)


def _read_weights(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    if not path.is_file():
        raise UsageError(
            f"there are no Inception weights at {path} ({no_file(path)}): give pytorch-fid's pt_inception-2015-12-05"
        )
    try:
        with utf8_path(path) as named:
            if path.suffix == ".safetensors":
                found = load_file(named)
            else:
                found = torch.load(named, map_location="cpu", weights_only=True)
        # A count of training batches, which some copies of the file lack, plays no part in evaluation.
        counts = {key: value for key, value in expected.items() if key.endswith("num_batches_tracked")}
        shapes = {key: tuple(value.shape) for key, value in found.items() if not key.endswith("num_batches_tracked")}
    except Exception as error:  # the readers raise many kinds, some with messages of many lines
        raise UsageError(f"cannot read {path} as a file of weights ({type(error).__name__}): is it whole?") from None
    wanted = {key: tuple(value.shape) for key, value in expected.items() if key not in counts}
    different = sorted(key for key in wanted.keys() | shapes.keys() if wanted.get(key) != shapes.get(key))
    if different:
        key = different[0]
        raise UsageError(
            f"{path} does not hold the Inception network of the FID: {len(different)} of its tensors differ, the first "
            f"{key} (expected {wanted.get(key, 'none')}, found {shapes.get(key, 'none')}); "
            "give pytorch-fid's pt_inception-2015-12-05 file"
        )
    for key in wanted:
        if not bool(torch.isfinite(found[key]).all()):
            raise UsageError(
                f"{path} has weights that are not finite ({key}): give pytorch-fid's pt_inception-2015-12-05 file"
            )
    return {key: found[key] for key in wanted} | counts
