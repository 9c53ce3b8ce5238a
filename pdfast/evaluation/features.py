"""Named feature spaces for distances and scores.

Each is a module in eval mode: uint8 images [n, C, H, W] -> float32 [n, num_features], without gradients. `logits` goes on
from features to its classifier's logits, float32 [n, classes]. `name` is that of the Frechet distance in it, `sha256` that
of its weights, `natural` says whether it is one for natural images. Figures are only comparable within one space, and are
called FID, KID and IS in that of the published Inception weights alone.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdfast.data import PIXELS, load_source
from pdfast.diffusion.noise import permutation
from pdfast.evaluation.inception import InceptionFeatures, check_weights
from pdfast.evaluation.metrics import fixed_seed
from pdfast.evaluation.mobilenet import MobileNetFeatures, weights_file
from pdfast.io.errors import UsageError

SEED = 0
NUM_TRAINED = 1437  # digits that the digits' features are trained on; the others test the classifier
UPDATES = 300
BATCH_SIZE = 128
LEARNING_RATE = 1.5e-3


def _check_digits(shape: tuple[int, ...]) -> None:
    if shape != (1, 8, 8):
        raise UsageError(
            "the feature space digits takes images of (channels, height, width) (1, 8, 8), "
            f"not {shape}: set --evaluation.features to mobilenet"
        )


class DigitsFeatures(nn.Module):
    """FD-digits: the last hidden layer of a small classifier of the built-in 8x8 digits."""

    name = "FD-digits"
    num_features = 32
    natural = False

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(1024, self.num_features),
            nn.SiLU(),
        )
        self.classify = nn.Linear(self.num_features, 10)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return uint8 [n, 1, 8, 8] -> float32 [n, 32]. UsageError for images of another shape."""
        _check_digits(tuple(images.shape[1:]))
        return self.hidden(images.float() / 127.5 - 1)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Return float32 [n, 32] -> [n, 10]."""
        return self.classify(features)

    @property
    def sha256(self) -> str:
        """Of the weights, which another kind of processor may train to other bits."""
        digest = hashlib.sha256()
        for tensor in self.state_dict().values():
            digest.update(tensor.cpu().numpy())
        return digest.hexdigest()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# One thread: a network this small gains nothing from more, on a busy machine they took 65 s in place of 3 waiting for
# each other, and the space does not depend on their number.
@_one_thread()
@torch.enable_grad()
def train_digits_features() -> DigitsFeatures:
    """Return the digits' feature space, in a few seconds on a CPU; the same on every call, global generators left alone."""
    source = load_source("digits", image_size=8, channels=1)
    trained = permutation(SEED, 0, source.num_images)[:NUM_TRAINED]
    with fixed_seed(SEED):
        network = DigitsFeatures()
    optimizer = torch.optim.Adam(network.parameters())
    for update in range(UPDATES):
        samples = torch.arange(update * BATCH_SIZE, (update + 1) * BATCH_SIZE)
        order = permutation(SEED, 1 + update * BATCH_SIZE // NUM_TRAINED, NUM_TRAINED)
        batch = source.take(trained[order[samples % NUM_TRAINED]])
        loss = F.cross_entropy(network.classify(network.hidden(PIXELS.encode(batch.x))), batch.cond)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - update / UPDATES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


FeatureSpace = DigitsFeatures | MobileNetFeatures | InceptionFeatures


def check_feature_space(spec: str, shape: tuple[int, int, int] | None = None, *, weights: bool = True) -> None:
    """Raise a UsageError where there is no such feature space, a file of weights is missing or none of it, or it takes no
    images of shape (H, W, C); with `weights` also where those that a package carries are not installed."""
    if spec == "digits":
        if shape is not None:
            _check_digits((shape[2], *shape[:2]))
    elif spec == "mobilenet":
        _check_channels("mobilenet", shape)
        if weights:
            weights_file()
    elif Path(spec).suffix in (".pth", ".pt", ".safetensors"):
        _check_channels(spec, shape)
        check_weights(Path(spec))
    else:
        raise UsageError(
            f"unknown feature space {spec!r}: choose digits, mobilenet, or give a .pth or .safetensors file of "
            "Inception weights"
        )


def _check_channels(spec: str, shape: tuple[int, int, int] | None) -> None:
    if shape is not None and shape[2] not in (1, 3):
        raise UsageError(
            f"the feature space {spec} takes images of 1 or 3 channels, not {shape[2]}: images of other channels cannot be "
            "evaluated"
        )


def load_feature_space(
    spec: str, *, shape: tuple[int, int, int] | None = None, device: torch.device | str = "cpu"
) -> FeatureSpace:
    """`digits`, `mobilenet`, or a path to Inception weights. UsageError for anything else, or where it takes no images of shape
    (H, W, C)."""
    check_feature_space(spec, shape)
    if spec == "digits":
        return train_digits_features().to(device)
    if spec == "mobilenet":
        return MobileNetFeatures().to(device)
    return InceptionFeatures(Path(spec)).to(device)
