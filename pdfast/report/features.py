"""Named feature spaces for the Frechet distance.

Each is a module in eval mode with `name` and `num_features`: uint8 images [n, C, H, W] -> float32 [n, num_features], without
gradients. A distance is only comparable within one space, and is called FID in that of the published Inception weights alone.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdfast.data import load_source
from pdfast.errors import UsageError


class DigitsFeatures(nn.Module):
    """FD-digits: the last hidden layer of a small classifier of the built-in 8x8 digits, trained from a fixed seed."""

    name = "FD-digits"
    num_features = 32

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(1024, self.num_features),
            nn.SiLU(),
        )
        self.classify = nn.Linear(self.num_features, 10)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.float() / 127.5 - 1)


def train_digits_features(updates: int = 200, batch_size: int = 128, seed: int = 1) -> DigitsFeatures:
    """The digits' feature space, a few seconds on a CPU; the same on every call, and torch's global generator is left alone."""
    source = load_source("digits", image_size=8, channels=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DigitsFeatures()
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
        for update in range(updates):
            batch = source.batch(torch.arange(update * batch_size, (update + 1) * batch_size), seed)
            x = batch.images.permute(0, 3, 1, 2).float() / 127.5 - 1
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - update / updates)
            # Label smoothing keeps the features from saturating, where they would no longer see how good a digit is.
            loss = F.cross_entropy(network.classify(network.layers(x)), batch.labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval().requires_grad_(False)


def load_feature_space(spec: str, *, device: torch.device | str = "cpu") -> nn.Module:
    """`digits`, `mobilenet`, or a path to Inception weights (then it is called FID). UsageError for anything else."""
    if spec == "digits":
        return train_digits_features().to(device)
    if spec == "mobilenet":
        from pdfast.report.mobilenet import MobileNetFeatures

        return MobileNetFeatures().eval().to(device)
    if Path(spec).suffix in (".pth", ".pt", ".safetensors"):
        from pdfast.report.inception import InceptionFeatures

        return InceptionFeatures(Path(spec)).eval().to(device)
    raise UsageError(
        f"unknown feature space {spec!r}: choose digits, mobilenet, or give a .pth or .safetensors file of Inception weights"
    )
